"""PeerRecords, announcements and registry deltas: what a node signs is taken, every change to it is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from struct import pack

import pytest
from nacl.signing import SigningKey, VerifyKey

from hyperspace_vllm.core.records.announcement import (
    ANNOUNCEMENT_BYTES_MAX,
    PREFIX_TOPIC,
    RESPONSE_TOPIC,
    Announcement,
    EvidenceEntry,
    PrefixEntry,
    ResponseEntry,
    check_announcement,
    decode_announcement,
    encode_announcement,
)
from hyperspace_vllm.core.records.errors import ProtocolViolation, Refused
from hyperspace_vllm.core.records.ids import network_id, peer_id, sha256
from hyperspace_vllm.core.records.limits import (
    ANNOUNCEMENT_ENTRIES_MAX,
    CLOCK_SKEW_MS,
    EVIDENCE_ENTRIES_MAX,
    PEER_RECORD_BYTES_MAX,
    PEER_RECORD_TTL_MS,
    REGISTRY_DELTA_BYTES_MAX,
    REGISTRY_TTL_MS,
)
from hyperspace_vllm.core.records.peer_record import PeerRecord, check_peer_record, decode_peer_record
from hyperspace_vllm.core.records.registry_delta import RegistryDelta, check_delta, decode_delta, encode_delta
from hyperspace_vllm.core.records.signing import member_tag
from tests.support.paths import VECTORS

NETWORK, OTHER = network_id("test"), network_id("other")
KEY, STRANGER = SigningKey(bytes([9]) * 32), SigningKey(bytes([1]) * 32)
AUTHOR = KEY.verify_key.encode()
NOW_MS = 1_800_000_000_000

RECORD = PeerRecord(
    NETWORK,
    AUTHOR,
    sequence=7,
    expires_at_ms=NOW_MS + PEER_RECORD_TTL_MS,
    address="10.0.0.1:7790",
    endpoint="10.0.0.1:7791",
    member_tag=bytes([4]) * 32,
    capacity_bytes=1 << 40,
    load_permille=250,
    models=(bytes([8]) * 32,),
    fingerprints=(bytes([5]) * 32, bytes([6]) * 32),
    vram_digest=b"bloom",
).sign(KEY)
RESPONSES = Announcement(
    NETWORK, AUTHOR, 5, NOW_MS, (ResponseEntry(bytes([1]) * 32, NOW_MS + 1), ResponseEntry(bytes([2]) * 32, NOW_MS + 2))
)
PREFIXES = Announcement(
    NETWORK, AUTHOR, 6, NOW_MS, (PrefixEntry(bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 48, NOW_MS + 1),)
)
LIE = EvidenceEntry(bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32, bytes([4]) * 32, NOW_MS, bytes([5]) * 64, 40, 2)
EVIDENCE = Announcement(NETWORK, AUTHOR, 7, NOW_MS, (LIE, replace(LIE, far=40)))
SNAPSHOT = RegistryDelta(NETWORK, AUTHOR, 3, 0, "snapshot", NOW_MS + REGISTRY_TTL_MS, b"loro")
UPDATE = RegistryDelta(NETWORK, AUTHOR, 3, 1, "update", NOW_MS + REGISTRY_TTL_MS, b"")


def take_record(raw: bytes, now_ms: int = NOW_MS, network: bytes = NETWORK) -> PeerRecord:
    record = decode_peer_record(raw)
    check_peer_record(record, network, now_ms)  # type: ignore[arg-type]
    return record


def take_announcement(raw: bytes, now_ms: int = NOW_MS, network: bytes = NETWORK) -> Announcement:
    batch = decode_announcement(raw)
    check_announcement(raw, batch, network, now_ms)  # type: ignore[arg-type]
    return batch


def take_delta(raw: bytes, now_ms: int = NOW_MS, network: bytes = NETWORK) -> RegistryDelta:
    delta = decode_delta(raw)
    check_delta(raw, delta, network, now_ms)  # type: ignore[arg-type]
    return delta


Take = Callable[..., object]
SIGNED: list[tuple[Take, bytes]] = [
    (take_record, RECORD.encode()),
    (take_record, PeerRecord(NETWORK, AUTHOR, 1, NOW_MS + 1, "").sign(KEY).encode()),
    (take_announcement, encode_announcement(RESPONSES, KEY)),
    (take_announcement, encode_announcement(PREFIXES, KEY)),
    (take_announcement, encode_announcement(EVIDENCE, KEY)),
    (take_delta, encode_delta(SNAPSHOT, KEY)),
    (take_delta, encode_delta(UPDATE, KEY)),
]
each = pytest.mark.parametrize(("take", "raw"), SIGNED)


def reason(take: Take, raw: bytes, **arguments: object) -> str:
    with pytest.raises(Refused) as refused:
        take(raw, **arguments)
    return refused.value.reason


def test_what_a_node_signs_is_taken() -> None:
    assert take_record(RECORD.encode()) == RECORD
    assert take_announcement(encode_announcement(RESPONSES, KEY)) == RESPONSES
    assert take_announcement(encode_announcement(PREFIXES, KEY)) == PREFIXES
    assert take_announcement(encode_announcement(EVIDENCE, KEY)) == EVIDENCE
    assert take_delta(encode_delta(SNAPSHOT, KEY)) == SNAPSHOT
    assert take_delta(encode_delta(UPDATE, KEY)) == UPDATE


@each
def test_every_flipped_bit_is_refused(take: Take, raw: bytes) -> None:
    for at in range(len(raw)):
        for bit in range(8):
            damaged = raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
            with pytest.raises((ProtocolViolation, Refused)):
                take(damaged)


@each
def test_every_truncation_and_anything_appended_is_a_violation(take: Take, raw: bytes) -> None:
    for damaged in [raw[:size] for size in range(len(raw))] + [raw + b"\0", raw + raw]:
        with pytest.raises(ProtocolViolation):
            take(damaged)


@each
def test_another_networks_records_are_refused(take: Take, raw: bytes) -> None:
    assert reason(take, raw, network=OTHER) == "other_network"


@each
def test_a_stranger_cannot_sign_for_the_author(take: Take, raw: bytes) -> None:
    body = raw[:-64]
    for tag in (b"hyperspace/peer-record/1", b"hyperspace/announcement/1", b"hyperspace/registry-delta/1", b""):
        assert reason(take, body + STRANGER.sign(tag + body).signature) == "bad_signature"


@each
def test_a_key_that_is_no_key_is_refused(take: Take, raw: bytes) -> None:
    """All ones, no point of the curve; zeros, a point of small order under which anybody could sign anything."""
    for key in (b"\xff" * 32, bytes(32)):
        assert reason(take, raw[:32] + key + raw[64:]) == "bad_signature"


def test_no_signature_counts_under_the_tag_of_another_format() -> None:
    for take, raw in SIGNED:
        for other_take, other in SIGNED:
            if other_take is not take:
                with pytest.raises((ProtocolViolation, Refused)):
                    other_take(other[:-64] + raw[-64:])


@pytest.mark.parametrize(
    ("take", "raw", "now_ms", "expected"),
    [
        (take_record, RECORD.encode(), RECORD.expires_at_ms - 1, ""),
        (take_record, RECORD.encode(), RECORD.expires_at_ms, "expired"),
        (take_record, RECORD.encode(), NOW_MS - CLOCK_SKEW_MS, ""),
        (take_record, RECORD.encode(), NOW_MS - CLOCK_SKEW_MS - 1, "from_the_future"),
        (take_announcement, encode_announcement(RESPONSES, KEY), NOW_MS + CLOCK_SKEW_MS, ""),
        (take_announcement, encode_announcement(RESPONSES, KEY), NOW_MS + CLOCK_SKEW_MS + 1, "stale"),
        (take_announcement, encode_announcement(RESPONSES, KEY), NOW_MS - CLOCK_SKEW_MS, ""),
        (take_announcement, encode_announcement(RESPONSES, KEY), NOW_MS - CLOCK_SKEW_MS - 1, "from_the_future"),
        (take_delta, encode_delta(SNAPSHOT, KEY), SNAPSHOT.expires_at_ms - 1, ""),
        (take_delta, encode_delta(SNAPSHOT, KEY), SNAPSHOT.expires_at_ms, "expired"),
        (take_delta, encode_delta(SNAPSHOT, KEY), NOW_MS - CLOCK_SKEW_MS, ""),
        (take_delta, encode_delta(SNAPSHOT, KEY), NOW_MS - CLOCK_SKEW_MS - 1, "from_the_future"),
    ],
)
def test_records_count_in_their_time_alone(take: Take, raw: bytes, now_ms: int, expected: str) -> None:
    if expected:
        assert reason(take, raw, now_ms=now_ms) == expected
    else:
        take(raw, now_ms=now_ms)


def test_the_largest_of_each_is_taken_and_a_larger_one_is_not() -> None:
    digests = tuple(bytes([number]) * 32 for number in range(16))
    record = replace(RECORD, address="a" * 255, endpoint="b" * 255, models=digests, fingerprints=digests)
    record = replace(record, vram_digest=bytes(4096)).sign(KEY)
    assert take_record(record.encode()) == record
    assert len(record.encode()) <= PEER_RECORD_BYTES_MAX
    for larger in (replace(record, vram_digest=bytes(4097)), replace(record, models=(*digests, bytes(32)))):
        with pytest.raises(ProtocolViolation):
            take_record(larger.sign(KEY).encode())

    entries = PREFIXES.entries * ANNOUNCEMENT_ENTRIES_MAX
    raw = encode_announcement(replace(PREFIXES, entries=entries), KEY)
    assert len(raw) == ANNOUNCEMENT_BYTES_MAX
    assert len(take_announcement(raw).entries) == ANNOUNCEMENT_ENTRIES_MAX
    one_more = raw[:81] + (ANNOUNCEMENT_ENTRIES_MAX + 1).to_bytes(2, "big") + raw[83:-64] + bytes(120 + 64)
    none = raw[:81] + bytes(2) + raw[-64:]
    for damaged in (one_more, none):
        with pytest.raises(ProtocolViolation):
            take_announcement(damaged)

    raw = encode_announcement(replace(EVIDENCE, entries=(LIE,) * EVIDENCE_ENTRIES_MAX), KEY)
    assert len(take_announcement(raw).entries) == EVIDENCE_ENTRIES_MAX
    with pytest.raises(ProtocolViolation):
        take_announcement(raw[:81] + (EVIDENCE_ENTRIES_MAX + 1).to_bytes(2, "big") + raw[83:-64] + bytes(208 + 64))

    overhead = len(encode_delta(UPDATE, KEY))
    raw = encode_delta(replace(SNAPSHOT, payload=bytes(REGISTRY_DELTA_BYTES_MAX - overhead)), KEY)
    take_delta(raw)
    with pytest.raises(ProtocolViolation):
        take_delta(raw[:89] + (REGISTRY_DELTA_BYTES_MAX - overhead + 1).to_bytes(4, "big") + raw[93:] + b"\0")


@pytest.mark.parametrize("delta", [replace(SNAPSHOT, sequence=1), replace(UPDATE, sequence=0)])
def test_an_epoch_begins_with_its_snapshot_and_has_no_other(delta: RegistryDelta) -> None:
    with pytest.raises(ProtocolViolation, match="sequence"):
        take_delta(encode_delta(delta, KEY))


def test_names_that_are_not_ascii_are_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="address"):
        take_record(replace(RECORD, address="é:1").sign(KEY).encode())


# --- the published vectors, each beside docs/protocol.md written out ---------------------------------


def vectors(name: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((VECTORS / f"{name}.json").read_text())
    assert len(rows) >= 2
    return rows


def test_peer_records_match_the_published_vectors() -> None:
    for row in vectors("peer_record"):
        key, network = SigningKey(bytes.fromhex(str(row["signing_seed"]))), network_id(str(row["network"]))
        public, address, endpoint = key.verify_key.encode(), str(row["address"]), str(row["endpoint"])
        models, prints = ([bytes.fromhex(one) for one in row[name]] for name in ("models", "fingerprints"))  # type: ignore[attr-defined]
        vram, tag = bytes.fromhex(str(row["vram_digest"])), bytes.fromhex(str(row["member_tag"]))
        body = network + public + pack(">QQ", row["sequence"], row["expires_at_ms"]) + tag
        body += pack(">QH", row["capacity_bytes"], row["load_permille"])
        body += bytes([len(address)]) + address.encode() + bytes([len(endpoint)]) + endpoint.encode()
        body += bytes([len(models)]) + b"".join(models) + bytes([len(prints)]) + b"".join(prints)
        body += pack(">H", len(vram)) + vram
        raw = bytes.fromhex(str(row["record"]))
        assert raw == body + key.sign(b"hyperspace/peer-record/1" + body).signature
        record = decode_peer_record(raw)
        check_peer_record(record, network, record.expires_at_ms - 1)
        assert record.peer == row["peer_id"] == peer_id(public)
        assert record.address == address
        assert record.models == tuple(models)
        if row["network_key"]:
            assert member_tag(bytes.fromhex(str(row["network_key"])), public) == tag


def test_announcements_match_the_published_vectors() -> None:
    for row in vectors("announcement"):
        key, network = SigningKey(bytes.fromhex(str(row["signing_seed"]))), network_id(str(row["network"]))
        entries: list[dict[str, object]] = row["entries"]  # type: ignore[assignment]
        packed = b""
        for entry in entries:
            for name, value in entry.items():
                wide = ">I" if name in ("tokens", "far") else ">Q"
                packed += bytes.fromhex(value) if isinstance(value, str) else pack(wide, value)
        kind = {"request_hash": 1, "row_id": 2, "signer": 3}[next(iter(entries[0]))]
        body = network + key.verify_key.encode() + pack(">QQ", row["sequence"], row["sent_at_ms"])
        body += pack(">BH", kind, len(entries)) + packed
        raw = bytes.fromhex(str(row["announcement"]))
        assert raw == body + key.sign(b"hyperspace/announcement/1" + body).signature
        batch = decode_announcement(raw)
        check_announcement(raw, batch, network, int(str(row["sent_at_ms"])))
        assert batch.topic == row["topic"]
        for lie in (each for each in batch.entries if isinstance(each, EvidenceEntry)):
            integrity = sha256(lie.request_hash, lie.response_hash, lie.proof_hash, pack(">Q", lie.computed_at_ms))
            VerifyKey(lie.signer).verify(b"hyperspace/cache-proof/1" + integrity, lie.signature)
    assert [row["topic"] for row in vectors("announcement")] == [RESPONSE_TOPIC, PREFIX_TOPIC, RESPONSE_TOPIC]


def test_registry_deltas_match_the_published_vectors() -> None:
    for row in vectors("registry_delta"):
        key, network = SigningKey(bytes.fromhex(str(row["signing_seed"]))), network_id(str(row["network"]))
        payload = bytes.fromhex(str(row["payload"]))
        body = network + key.verify_key.encode() + pack(">QQ", row["epoch"], row["sequence"])
        body += pack(">BQI", row["kind"] == "update", row["expires_at_ms"], len(payload)) + payload
        raw = bytes.fromhex(str(row["delta"]))
        assert raw == body + key.sign(b"hyperspace/registry-delta/1" + body).signature
        delta = decode_delta(raw)
        check_delta(raw, delta, network, delta.expires_at_ms - 1)
        assert delta.payload == payload
