"""Fixtures of this room."""

from tests.support.worker_bench import device, plan

__all__ = ["device", "plan"]
