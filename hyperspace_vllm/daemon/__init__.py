"""The node: one process a data directory, the shell of the core.

`main` builds it, `driver` and `network_driver` perform the cores' effects, `join` brings it into the network.
Input: messages of engines (`local`) and of peers (`kv`, `libp2p`). Output: rows, responses and records. Everything that
peers sent is checked before it is believed. The room may not import vLLM.
"""
