"""L1: which requests may share an answer, which answers are stored, and how an answer is proved, found and audited.

Input: requests as JSON, answers, proofs and announcements. Output: keys, verdicts and the steps of a lookup.
"""
