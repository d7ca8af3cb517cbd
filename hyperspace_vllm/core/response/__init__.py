"""L1: which requests may share an answer, what may be stored, how an answer is proved, found and audited.

In come requests as JSON, answers, proofs and announcements; out go keys, verdicts and the steps of a lookup.
"""
