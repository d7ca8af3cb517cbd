"""Semantic hits: whether a stored answer to one question may answer another.

Input: two questions and the cosine of their embeddings. Output: a verdict with its reason. Embeddings are computed in
`daemon/responses`. English only: a question in other words that the guards don't know is not served.
"""
