"""The node: one process a data directory, the shell of the core.

`main` builds it, `driver` and `network_driver` perform the cores' effects, `join` brings it into the network. In come
messages of engines (`local`) and of peers (`kv`, `libp2p`), out go rows, responses and records. Everything that peers
sent is checked before it is believed. The room may not import vLLM.
"""
