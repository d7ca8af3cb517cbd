"""Fixtures of this room."""

from tests.support.daemons.small_node import node, strict

__all__ = ["node", "strict"]
