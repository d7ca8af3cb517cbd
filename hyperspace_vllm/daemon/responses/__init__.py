"""Responses on this node: the store and its writer, the server for peers, audits and semantic hits.

Input: computed and fetched responses and peers' queries. Output: sealed answers and changes of what can be served.
"""
