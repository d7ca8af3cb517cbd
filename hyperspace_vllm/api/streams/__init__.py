"""The streams of vLLM's endpoints: from frames to the JSON body that vLLM would have sent, and back.

Input: frames or a stored body. Output: the other. The room knows no request, no cache and no node.
"""
