"""Fixtures of this room."""

from tests.support.audits import bench, server

__all__ = ["bench", "server"]
