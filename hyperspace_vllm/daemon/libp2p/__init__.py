"""libp2p for an asyncio program: py-libp2p in its own thread, with bounds on what peers cost.

Input: calls with deadlines. Output: their results and what peers sent. `libp2p_host` is the only entry: nothing outside
the room imports trio or libp2p.
"""
