"""The node: one process a data directory, the shell of the core.

Input: messages of engines (`local`) and of peers (`kv`, `libp2p`). Output: rows, responses and records. Everything that
peers sent is checked before it is believed. The modules here are what its rooms share; `node` puts the rooms together.
The package may not import vLLM.
"""
