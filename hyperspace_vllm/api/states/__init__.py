"""The ways of a request to its answer: each is a state with one verb, which answers or says that it can't.

Input: a `RequestContext`, and what the states before have found. Output: the answer, sent to the client. `exchange.py`
chooses the first one. A state may change nothing of the request, and keeps nothing of its own beyond it.
"""
