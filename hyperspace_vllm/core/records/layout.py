"""The layout of one segment's KV: the plan that scheduler, worker, node and peers share.

A *part* is the set of layers with one attention reach. Two nodes share rows only when the whole layout (through the KV
fingerprint) agrees; see docs/design.md.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from .limits import PARTS_MAX, RANKS_MAX, ROW_BYTES_MAX


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers of one attention reach. `window_tokens` 0 means full attention; `row_bytes` is one rank's row."""

    window_tokens: Annotated[int, Meta(ge=0, le=1 << 30)]
    row_bytes: Annotated[int, Meta(ge=1, le=ROW_BYTES_MAX)]


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`fingerprint` is the 32-byte digest of the KV fingerprint; parts are ordered and numbered from 0."""

    fingerprint: Annotated[bytes, Meta(min_length=32, max_length=32)]
    segment_tokens: Annotated[int, Meta(ge=1, le=1 << 20)]
    parts: Annotated[tuple[Part, ...], Meta(min_length=1, max_length=PARTS_MAX)]
    ranks: Annotated[int, Meta(ge=1, le=RANKS_MAX)]

    def first_segment(self, part: int, start_token: int, end_segment: int) -> int:
        """First segment whose row of `part` is needed to continue at `end_segment * segment_tokens`.

        Tokens before `start_token` are in the engine already. A sliding-window layer reads only the `window_tokens - 1`
        tokens before the next one, so earlier rows are not fetched.
        """
        first = start_token // self.segment_tokens
        window = self.parts[part].window_tokens
        if not window:
            return first
        tail_token = end_segment * self.segment_tokens - (window - 1)
        return max(first, max(tail_token, 0) // self.segment_tokens)
