"""Signed batches on the two GossipSub topics: responses or KV rows that a node can serve, evidence of false answers.

    batch    = body || signature
    body     = network id 32 | sender 32 | sequence u64 | sent at u64 ms | kind u8 | count u16 | entries
    response = request hash 32 | expires at u64 ms                                          (kind 1)
    prefix   = row id 32 | manifest digest 32 | commitment 48 | expires at u64 ms           (kind 2)
    evidence = signer 32 | request hash 32 | response hash 32 | proof hash 32 | computed at u64 ms | signature 64
               | tokens u32 | far u32                                                       (kind 3)

Integers are big-endian, the signature is Ed25519 over the tag and the body, and the sender's sequence only grows:
repeated or older batches are dropped. Announcements travel in batches because py-libp2p's GossipSub passes at most ten
messages a second per peer (docs/notes/py-libp2p.md).

Evidence has the part of the accused node's CacheProof that its signature covers, in a fixed size: the proof hash stands
for the omitted fields. So no node is accused of an answer that it never signed.
"""

from dataclasses import dataclass
from typing import assert_never

from nacl.signing import SigningKey

from .errors import ProtocolViolation, Refused
from .ids import NetworkId
from .limits import ANNOUNCEMENT_ENTRIES_MAX, CLOCK_SKEW_MS, EVIDENCE_ENTRIES_MAX
from .signing import SIGNATURE_BYTES, sign, verify

RESPONSE_TOPIC = "hyperspace/cache/announcements"
PREFIX_TOPIC = "hyperspace/kv-prefix/announcements"

_TAG = b"hyperspace/announcement/1"
_HEAD_BYTES = 32 + 32 + 8 + 8 + 1 + 2
_RESPONSE, _PREFIX, _EVIDENCE = 1, 2, 3
_ENTRY_BYTES = {_RESPONSE: 32 + 8, _PREFIX: 32 + 32 + 48 + 8, _EVIDENCE: 4 * 32 + 8 + SIGNATURE_BYTES + 4 + 4}
_ENTRIES_MAX = {
    _RESPONSE: ANNOUNCEMENT_ENTRIES_MAX,
    _PREFIX: ANNOUNCEMENT_ENTRIES_MAX,
    _EVIDENCE: EVIDENCE_ENTRIES_MAX,
}
ANNOUNCEMENT_BYTES_MAX = _HEAD_BYTES + ANNOUNCEMENT_ENTRIES_MAX * _ENTRY_BYTES[_PREFIX] + SIGNATURE_BYTES

assert all(_ENTRIES_MAX[kind] * _ENTRY_BYTES[kind] <= ANNOUNCEMENT_BYTES_MAX for kind in _ENTRY_BYTES)


@dataclass(frozen=True, slots=True)
class ResponseEntry:
    """A response that the sender can serve until `expires_at_ms`."""

    request_hash: bytes
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class PrefixEntry:
    """A KV row that the sender can serve, with its manifest and KZG commitment."""

    row_id: bytes
    manifest: bytes
    commitment: bytes
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class EvidenceEntry:
    """`signer` signed the statement in the next five fields; of its `tokens` tokens, `far` are not its model's.

    Other nodes can check the signature, but not the count: they don't know the prompt (core/peers/suspicion.py).
    """

    signer: bytes
    request_hash: bytes
    response_hash: bytes
    proof_hash: bytes
    computed_at_ms: int
    signature: bytes
    tokens: int
    far: int


Entries = tuple[ResponseEntry, ...] | tuple[PrefixEntry, ...] | tuple[EvidenceEntry, ...]


@dataclass(frozen=True, slots=True)
class Announcement:
    """A batch of one kind; `sender` is an Ed25519 public key."""

    network: NetworkId
    sender: bytes
    sequence: int
    sent_at_ms: int
    entries: Entries

    @property
    def topic(self) -> str:
        """The GossipSub topic of its kind."""
        return PREFIX_TOPIC if isinstance(self.entries[0], PrefixEntry) else RESPONSE_TOPIC


def encode_announcement(batch: Announcement, key: SigningKey) -> bytes:
    """The signed bytes of a batch of 1 to ANNOUNCEMENT_ENTRIES_MAX entries (evidence: EVIDENCE_ENTRIES_MAX)."""
    kind = _kind_of(batch.entries[0])
    assert 0 < len(batch.entries) <= _ENTRIES_MAX[kind]
    entries = b"".join(_encode_entry(entry) for entry in batch.entries)
    body = b"".join(
        (
            batch.network,
            batch.sender,
            batch.sequence.to_bytes(8, "big"),
            batch.sent_at_ms.to_bytes(8, "big"),
            bytes([kind]),
            len(batch.entries).to_bytes(2, "big"),
            entries,
        )
    )
    return body + sign(key, _TAG, body)


def decode_announcement(raw: bytes) -> Announcement:
    """The batch in `raw`; `ProtocolViolation` names the field. Unverified: `check_announcement` verifies it."""
    if not _HEAD_BYTES + SIGNATURE_BYTES < len(raw) <= ANNOUNCEMENT_BYTES_MAX:
        raise ProtocolViolation(f"announcement: {len(raw)} bytes, expected at most {ANNOUNCEMENT_BYTES_MAX}")
    kind = raw[80]
    if kind not in _ENTRY_BYTES:
        raise ProtocolViolation(f"announcement kind {kind}: expected 1 to 3")
    count = int.from_bytes(raw[81:83], "big")
    size = _ENTRY_BYTES[kind]
    if not 0 < count <= _ENTRIES_MAX[kind] or len(raw) != _HEAD_BYTES + count * size + SIGNATURE_BYTES:
        raise ProtocolViolation(f"announcement count {count}: doesn't match {len(raw)} bytes")
    pieces = [raw[at : at + size] for at in range(_HEAD_BYTES, len(raw) - SIGNATURE_BYTES, size)]
    entries: Entries
    if kind == _RESPONSE:
        entries = tuple(ResponseEntry(piece[:32], _number(piece[32:])) for piece in pieces)
    elif kind == _PREFIX:
        entries = tuple(PrefixEntry(piece[:32], piece[32:64], piece[64:112], _number(piece[112:])) for piece in pieces)
    else:
        entries = tuple(_decode_evidence(piece) for piece in pieces)
    return Announcement(NetworkId(raw[:32]), raw[32:64], _number(raw[64:72]), _number(raw[72:80]), entries)


def is_of_later_version(raw: bytes, network: NetworkId, sender: bytes) -> bool:
    """Whether `raw` claims to be a batch of `sender`'s of a kind that this version can't read."""
    return len(raw) > _HEAD_BYTES and raw[:64] == network + sender and raw[80] not in _ENTRY_BYTES


def check_announcement(raw: bytes, batch: Announcement, network: NetworkId, wall_ms: int) -> None:
    """Raise `Refused` unless `batch`, decoded from `raw`, is of this network, recent, and signed by its sender."""
    if batch.network != network:
        raise Refused("other_network")
    if abs(batch.sent_at_ms - wall_ms) > CLOCK_SKEW_MS:
        raise Refused("stale" if batch.sent_at_ms < wall_ms else "from_the_future")
    verify(batch.sender, _TAG, raw[:-SIGNATURE_BYTES], raw[-SIGNATURE_BYTES:])


def _kind_of(entry: ResponseEntry | PrefixEntry | EvidenceEntry) -> int:
    match entry:
        case ResponseEntry():
            return _RESPONSE
        case PrefixEntry():
            return _PREFIX
        case EvidenceEntry():
            return _EVIDENCE
        case _:
            assert_never(entry)


def _encode_entry(entry: ResponseEntry | PrefixEntry | EvidenceEntry) -> bytes:
    match entry:
        case ResponseEntry(request_hash, expires_at_ms):
            return request_hash + expires_at_ms.to_bytes(8, "big")
        case PrefixEntry(row_id, manifest, commitment, expires_at_ms):
            return row_id + manifest + commitment + expires_at_ms.to_bytes(8, "big")
        case EvidenceEntry(signer, request_hash, response_hash, proof_hash, computed_at_ms, signature, tokens, far):
            statement = signer + request_hash + response_hash + proof_hash + computed_at_ms.to_bytes(8, "big")
            return statement + signature + tokens.to_bytes(4, "big") + far.to_bytes(4, "big")
        case _:
            assert_never(entry)


def _decode_evidence(raw: bytes) -> EvidenceEntry:
    hashes = raw[:32], raw[32:64], raw[64:96], raw[96:128]
    return EvidenceEntry(
        *hashes, _number(raw[128:136]), raw[136:200], tokens=_number(raw[200:204]), far=_number(raw[204:])
    )


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "big")
