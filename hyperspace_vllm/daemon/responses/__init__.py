"""Responses on this node: the store and its writer, what peers are served, audits and semantic hits.

In come computed and fetched responses and peers' queries; out go sealed answers and changes of what can be served.
"""
