"""Fixtures of this room."""

from tests.support.daemons.kv_sides import pair

__all__ = ["pair"]
