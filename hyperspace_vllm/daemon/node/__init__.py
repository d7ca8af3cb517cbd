"""One node put together: `main` builds its parts, `driver` steps the core, `prefix_effects` and `network_effects` act.

Input: events of the clients (`local`), of the disk and of peers. Output: effects performed, by the other rooms, which
know nothing of this one. `join` brings the node into its network while it serves its host already.
"""
