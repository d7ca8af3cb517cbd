"""Keys that stay on the node, the ids that travel for them, and libp2p peer ids.

A node that knows a key may read what it names, so only `wire_id(network, key)` ever leaves the node (docs/design.md).
"""

import hashlib
from functools import lru_cache
from typing import NewType

from .errors import ProtocolViolation

NetworkId = NewType("NetworkId", bytes)
SegmentKey = NewType("SegmentKey", bytes)
RequestKey = NewType("RequestKey", bytes)
RowKey = NewType("RowKey", bytes)
RowId = NewType("RowId", bytes)
ManifestDigest = NewType("ManifestDigest", bytes)
PeerId = NewType("PeerId", str)

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# identity multihash (0x00, 36 bytes) of the protobuf PublicKey {Type: Ed25519, Data: 32 bytes}; libp2p peer-ids spec
_ED25519_PEER_ID = bytes.fromhex("002408011220")


def sha256(*parts: bytes) -> bytes:
    """SHA-256 over the concatenation of `parts`; callers pass fixed-width fields, or one variable one at the end."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def network_id(name: str) -> NetworkId:
    """The 32-byte id of the network called `name`: nodes share nothing across networks."""
    return NetworkId(sha256(b"hyperspace/network/1", name.encode()))


def wire_id(network: NetworkId, key: bytes) -> bytes:
    """SHA-256('id' || network id || key): what the wire carries for a 32-byte key."""
    assert len(network) == 32
    assert len(key) == 32
    return sha256(b"id", network, key)


def row_key(segment: SegmentKey, part: int, rank: int) -> RowKey:
    """The key of one row: a segment's KV of part number `part` (by the layout's order) on TP rank `rank`."""
    return RowKey(sha256(b"hyperspace/row/2", segment, part.to_bytes(2, "big"), rank.to_bytes(2, "big")))


def row_id(network: NetworkId, key: RowKey) -> RowId:
    """The id under which a row is looked up among peers."""
    return RowId(wire_id(network, key))


@lru_cache(4096)  # 20 us in Python, and computed for every message
def peer_id(public_key: bytes) -> PeerId:
    """libp2p's peer id ("12D3KooW…") of a 32-byte Ed25519 public key."""
    assert len(public_key) == 32
    number = int.from_bytes(_ED25519_PEER_ID + public_key, "big")
    text = ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return PeerId("1" + text)  # base58btc writes the leading zero byte as '1'


@lru_cache(4096)  # 30 µs, and computed for every provider of a response
def public_key_of(peer: str) -> bytes:
    """The 32-byte Ed25519 public key inside a libp2p peer id; `ProtocolViolation` if it holds none."""
    if len(peer) > 64 or not peer.startswith("1") or any(c not in _BASE58 for c in peer):
        raise ProtocolViolation(f"peer id {peer[:70]!r}: expected base58btc such as 12D3KooW…")
    number = 0
    for c in peer:
        number = number * 58 + _BASE58.index(c)
    raw = number.to_bytes(60, "big")[-38:]
    key = raw[6:]
    if raw[:6] != _ED25519_PEER_ID or peer_id(key) != peer:
        raise ProtocolViolation(f"peer id {peer!r}: expected an Ed25519 identity (12D3KooW…)")
    return key
