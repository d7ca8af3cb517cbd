"""Segment length, the KV fingerprint and the chain of SegmentKeys (docs/protocol.md, "Keys and manifests").

Imported by engine processes: nothing here but hashing.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..records.errors import Refused
from ..records.ids import SegmentKey, sha256
from ..records.limits import PROMPT_SEGMENTS_MAX, SEGMENT_TOKENS_MAX, SEGMENT_TOKENS_MIN

Multimodal = tuple[bytes, int]  # (hash of the item, position in the prompt of its first token)

_FINGERPRINT_TAG = b"hyperspace/kv-fingerprint/1"
_SEED_TAG = b"hyperspace/segment-seed/1"


def segment_tokens(block_sizes: Sequence[int], scheduler_block_size: int) -> int:
    """Tokens per segment: the least multiple >= 256 of the scheduler's and of every KV group's block size.

    `Refused("segment_tokens")` when that exceeds SEGMENT_TOKENS_MAX: L2 then stays off.
    """
    sizes = (scheduler_block_size, *block_sizes)
    if any(size < 1 for size in sizes):
        raise Refused("segment_tokens", f"block sizes {sizes}: expected positive numbers")
    common = math.lcm(*sizes)
    tokens = -(-SEGMENT_TOKENS_MIN // common) * common
    if tokens > SEGMENT_TOKENS_MAX:
        raise Refused("segment_tokens", f"block sizes {sizes} share {tokens}, at most {SEGMENT_TOKENS_MAX}")
    return tokens


def fingerprint_digest(fields: Mapping[str, Any]) -> bytes:
    """SHA-256 (32 bytes) over the canonical JSON of `fields`: keys sorted, no spaces, ASCII, no NaN."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return sha256(_FINGERPRINT_TAG, text.encode())


def chain_seed(fingerprint: bytes, lora_digest: bytes, cache_salt: str, tenant: str) -> bytes:
    """h0 (32 bytes). `lora_digest` covers the adapter's files (b"": none); '' is no salt and no tenant."""
    assert len(fingerprint) == 32
    variable = (lora_digest, cache_salt.encode(), tenant.encode())
    return sha256(_SEED_TAG, fingerprint, *(_sized(part) for part in variable))


def next_key(previous: bytes, token_ids: Sequence[int], multimodal: Sequence[Multimodal] = ()) -> SegmentKey:
    """The key of the segment of `token_ids` that follows the one with key `previous` (or the chain's seed).

    `multimodal` lists the items whose first token is inside the segment, by position. The segment length is in the
    fingerprint, so that every key of a chain hashes equally many tokens and the pairs after them are unambiguous.
    """
    assert len(previous) == 32
    tokens = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return SegmentKey(sha256(previous, tokens, *(_sized(h) + struct.pack("<Q", at) for h, at in multimodal)))


def segment_keys(
    seed: bytes,
    token_ids: Sequence[int],
    tokens_each: int,
    multimodal: Sequence[Multimodal] = (),
    count: int = PROMPT_SEGMENTS_MAX,
) -> Iterator[SegmentKey]:
    """Keys of the first `count` segments of `tokens_each` tokens, whole segments only."""
    key = seed
    items = sorted(multimodal, key=lambda item: item[1])
    for segment in range(min(count, len(token_ids) // tokens_each)):
        start, end = segment * tokens_each, (segment + 1) * tokens_each
        key = next_key(key, token_ids[start:end], [item for item in items if start <= item[1] < end])
        yield SegmentKey(key)


def _sized(part: bytes) -> bytes:
    return struct.pack("<I", len(part)) + part
