"""Responses on this node: the store and its writer, what peers are served, audits and semantic hits.

Input: computed and fetched responses and peers' queries. Output: sealed answers and changes of what can be served.
"""
