"""The node's end of the local socket: sessions of engine processes, their leases and their staging slabs."""
