"""The ways of a request to its answer: each is a state with one method, which answers or says that it cannot.

Input: a `RequestContext`, and the results of earlier states. Output: the answer, sent to the client. `exchange.py`
chooses the first state. A state does not change the request, and keeps nothing after it.
"""
