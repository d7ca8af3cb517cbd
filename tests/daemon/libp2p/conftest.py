"""Fixtures of the libp2p tests."""

from tests.support.libp2p_members import members

__all__ = ["members"]
