"""L2: which KV rows a prefix needs, how staged rows are published, and from which peers rows are fetched.

Input: segment keys, staged rows and peers' offers. Output: loads, encodings and requests for chunks. The bytes
themselves stay in the arena and the stores (`daemon/kv`): the machines see ids, sizes and verdicts.
"""
