"""KV inside the node: arena, chunk store, codec, and the bulk transport to peers (ZeroMQ, CURVE).

Input: staged rows and peers' chunks. Output: verified rows in the arena and sealed chunks to peers.
"""
