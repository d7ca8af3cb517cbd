"""One node put together: `main` builds its parts, `driver` and `network_driver` perform the cores' effects.

Input: events of the clients (`local`), of the disk and of peers. Output: effects performed, by the other rooms, which
know nothing of this one. `join` brings the node into its network while it serves its host already.
"""
