"""Slabs: leases on runs of pages of the node's shared memory, and the rows that lie in them."""

from typing import Annotated

import msgspec
from msgspec import Meta

from ..records.limits import ROW_BYTES_MAX, KiB
from .message_fields import U32, U63

PAGE_BYTES = 64 * KiB  # of the arena: a slab takes whole ones


class Slab(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lease on `length` bytes at `offset` of the arena file.

    A reader copies, then checks that the u64 at header slot `slot` still equals `generation` (see arena.py).
    """

    slot: U32
    offset: U63
    length: Annotated[int, Meta(ge=1, le=ROW_BYTES_MAX)]
    generation: U63


def pages_bytes(length: int) -> int:
    """What a slab of `length` bytes takes from the arena."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


class LoadedRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One verified row, readable until the lookup is released."""

    segment: U32
    part: U32
    rank: U32
    slab: Slab
