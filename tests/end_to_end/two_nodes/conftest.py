"""Fixtures of this room."""

from tests.support.daemons.node_pair import pair, patience, pool

__all__ = ["pair", "patience", "pool"]
