"""The composers: each hands an event to the machine that it concerns, and merges deadlines.

`node` is the core of KV on one host, `network_node` of everything between nodes. Input: events. Output: effects.
"""
