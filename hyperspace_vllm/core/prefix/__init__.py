"""L2: which KV rows a prefix needs, what happens to rows that workers staged, and from which peers rows come.

Input: segment keys, staged rows and peers' offers. Output: loads, encodings and requests for chunks. The bytes
themselves stay in the arena and the stores (`daemon/kv`): the machines see ids, sizes and verdicts.
"""
