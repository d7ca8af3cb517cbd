"""Hyperspace: a network of caches for vLLM.

Responses (L1) and the KV state of prefixes (L2) are computed once and fetched, verified, from any other node. The
rooms: `core` decides, `daemon` (the node's process) and `api` and `vllm_adapter` (in vLLM's processes) do, `sim`
replays. docs/design.md is the map.
"""
