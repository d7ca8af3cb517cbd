"""The node: one process per data directory, the shell of the core.

Input: messages of engines (`local`) and of peers (`kv`, `libp2p`). Output: rows, responses and records. Everything from
peers is checked before it is used. The modules here are shared by the subpackages, which `node` assembles. The package
may not import vLLM.
"""
