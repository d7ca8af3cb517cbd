"""The response cache inside vLLM's API server: pure ASGI middleware.

Input: HTTP requests, as the server received and authenticated them. Output: stored answers, or vLLM's own answer,
passed on frame by frame and copied into the store. `middleware` is the entry; an `Exchange` chooses the way of one
request among `states`, and `RequestFacts` are the facts of the request.
This package may not import vLLM (vllm_adapter passes what it needs in `options`), nor write the database: the node
does.
"""
