"""Messages of the local socket, between engine processes and the node of their host."""
