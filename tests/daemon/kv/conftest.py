"""Fixtures of this room."""

from tests.support.kv_sides import pair

__all__ = ["pair"]
