"""L2: which KV rows a prefix needs, what becomes of rows that workers staged, and from which peers rows come.

Input: keys of segments, staged rows and what peers offer. Output: loads, encodings and requests for chunks. The bytes
themselves stay in the arena and the stores (`daemon/kv`): the machines see ids, sizes and verdicts.
"""
