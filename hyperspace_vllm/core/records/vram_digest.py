"""The digest of the prefixes that a node's engines have in memory: a Bloom filter of segment ids in its PeerRecord.

    digest = format 1 (u8) | positions k per id (u8, 1 to 16) | the filter's bits
    id     = wire_id(network, SegmentKey); a, b = its first and second 8 bytes as u64 big-endian, b's lowest bit set
    the filter has m = 8 x (length - 2) bits; an id sets bits (a + i x b) mod m for i = 0 .. k - 1;
    bit p is bit p mod 8 (the lowest is 0) of byte 2 + p // 8

An empty digest, or one of another format, has no information. A digest is a hint: absent ids may seem present, and a
node that routes by it loses at most one prefill. An id is a hash already, so no other hash is needed.
"""

import math
from collections.abc import Collection, Iterable

from .limits import VRAM_SEGMENTS_MAX
from .peer_record import VRAM_DIGEST_BYTES_MAX

_FORMAT = 1
_HEADER_BYTES = 2
POSITIONS_MAX = 16
BYTES_MIN = 64
BITS_EACH = 10  # 0.8 % false positives, while there is room


def digest_bytes(count: int) -> int:
    """Length of the digest of `count` ids: 0 for none, else the power of two that leaves BITS_EACH bits per id.

    It grows in steps, for the same reason as `positions_each`.
    """
    if not count:
        return 0
    needed = _HEADER_BYTES + -(-count * BITS_EACH // 8)
    return min(max(1 << (needed - 1).bit_length(), BYTES_MIN), VRAM_DIGEST_BYTES_MAX)


def positions_each(bits: int, count: int) -> int:
    """The number of positions per id that makes false positives rarest once a filter is full: 7, fewer beyond that.

    It is the same for all counts that fit, so that two digests of one length can be compared.
    """
    return max(round(bits / max(count, bits // BITS_EACH) * math.log(2)), 1)


def false_positives(bits: int, positions: int, count: int) -> float:
    """The share of absent ids that seem present: (1 - e^(-kn/m))^k."""
    return (1 - math.exp(-positions * count / bits)) ** positions


def make_digest(ids: Collection[bytes]) -> bytes:
    """The digest of segment ids; b"" of none. It is useful up to VRAM_SEGMENTS_MAX ids."""
    assert len(ids) <= VRAM_SEGMENTS_MAX
    if not ids:
        return b""
    size = digest_bytes(len(ids)) - _HEADER_BYTES
    bits, positions = 8 * size, positions_each(8 * size, len(ids))
    field = bytearray(size)
    for each in ids:
        for at in _positions(each, bits, positions):
            field[at >> 3] |= 1 << (at & 7)
    return bytes((_FORMAT, positions)) + field


def overlap(digest: bytes, ids: Iterable[bytes]) -> int:
    """How many leading ids of a prompt's segments, in order, the digest contains, false positives included."""
    positions = _positions_of(digest)
    if not positions:
        return 0
    bits, found = 8 * (len(digest) - _HEADER_BYTES), 0
    for each in ids:
        if not all(digest[_HEADER_BYTES + (at >> 3)] >> (at & 7) & 1 for at in _positions(each, bits, positions)):
            break
        found += 1
    return found


def approximate_count(digest: bytes) -> int:
    """About how many ids a digest holds, from the share of bits that are set: -(m/k) ln(1 - X/m)."""
    positions = _positions_of(digest)
    if not positions:
        return 0
    bits = 8 * (len(digest) - _HEADER_BYTES)
    unset = max(bits - int.from_bytes(digest[_HEADER_BYTES:], "big").bit_count(), 1)
    return round(-bits / positions * math.log(unset / bits))


def difference(one: bytes, other: bytes) -> float:
    """How much two digests differ, from 0 (not at all) to 1 (entirely, or not comparable)."""
    if one == other:
        return 0.0
    if one[:_HEADER_BYTES] != other[:_HEADER_BYTES] or len(one) != len(other):
        # Another k sets other bits. Beyond the ids that the largest filter holds, k changes with the count, every 15 %
        # or so.
        return 1.0
    mine, theirs = int.from_bytes(one[_HEADER_BYTES:], "big"), int.from_bytes(other[_HEADER_BYTES:], "big")
    return (mine ^ theirs).bit_count() / max((mine | theirs).bit_count(), 1)


def _positions_of(digest: bytes) -> int:
    """k of a readable digest, else 0."""
    if len(digest) <= _HEADER_BYTES or digest[0] != _FORMAT or not 1 <= digest[1] <= POSITIONS_MAX:
        return 0
    return digest[1]


def _positions(each: bytes, bits: int, positions: int) -> list[int]:
    first, step = int.from_bytes(each[:8], "big"), int.from_bytes(each[8:16], "big") | 1
    return [(first + i * step) % bits for i in range(positions)]
