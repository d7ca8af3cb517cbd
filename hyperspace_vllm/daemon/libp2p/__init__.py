"""libp2p behind asyncio: py-libp2p in a thread of its own, with bounds on what peers cost.

Input: calls with deadlines. Output: their results and what peers sent. `libp2p_host` is the only door: nothing
outside the room imports trio or libp2p.
"""
