"""KV on its way through the node: arena, chunk store, codec, and the bulk transport to peers (ZeroMQ, CURVE).

In come staged rows and peers' chunks, out go verified rows in the arena and sealed chunks to peers.
"""
