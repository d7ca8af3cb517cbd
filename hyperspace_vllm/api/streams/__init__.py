"""The streams of vLLM's endpoints: from frames to the JSON body that vLLM would have sent, and back.

Input: frames or a stored body. Output: the other. This package has no access to requests, cache or node.
"""
