"""L1: which requests may share an answer, what may be stored, how an answer is proved, found and audited.

Input: requests as JSON, answers, proofs and announcements. Output: keys, verdicts and the steps of a lookup.
"""
