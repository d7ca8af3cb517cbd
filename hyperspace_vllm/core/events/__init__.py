"""What the machines hear and what they want done: events and effects, as frozen dataclasses.

`kv_events` and `kv_effects` belong to `Node` (KV of this host), `network_events` and `network_effects` to
`NetworkNode`. The room holds no logic.
"""
