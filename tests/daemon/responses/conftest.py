"""Fixtures of this room."""

from tests.support.daemons.response_stores import clock, open_store, path

__all__ = ["clock", "open_store", "path"]
