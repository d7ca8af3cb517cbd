"""Formats between nodes: ids, signed records, manifests, messages, and the bounds on all of them.

Input: bytes. Output: values with form, size, signature and time checked, or the documented error. Each format has
vectors in tests/vectors. This package imports nothing else of the core.
"""
