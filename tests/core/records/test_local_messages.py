"""Any bytes either decode to a value within its bounds or raise ProtocolViolation: nothing else escapes a decoder."""

import contextlib
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperspace_vllm.core.local.claim_messages import ClaimEnded, ClaimRequest, RequestClaimed, RequestDone
from hyperspace_vllm.core.local.kv_messages import (
    LookupPrefix,
    PrefixAnswer,
    PrefixesInMemory,
    RegisterLayout,
    ReleaseLookup,
    RequestEnded,
    RowStaged,
    SegmentNamed,
    StagingGranted,
    StagingUnused,
    WantStaging,
)
from hyperspace_vllm.core.local.message_fields import NAME_CHARS_MAX
from hyperspace_vllm.core.local.messages import (
    ClientMessage,
    NodeMessage,
    decode_client_message,
    decode_node_message,
    encode,
)
from hyperspace_vllm.core.local.response_cache_messages import (
    SOURCE_BYTES_MAX,
    FindResponse,
    PurgeResponses,
    ReleaseResponse,
    ResponseAudited,
    ResponseFound,
    ResponseHint,
    ResponseNotFound,
    ResponseToTry,
    StoreResponse,
    TouchResponses,
)
from hyperspace_vllm.core.local.session_messages import (
    GetStatus,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    LeaseLost,
    Rejected,
    Status,
    Welcome,
)
from hyperspace_vllm.core.local.similar_messages import (
    FindSimilar,
    Question,
    RememberQuestion,
    SimilarChecked,
    SimilarFound,
    SimilarNotFound,
)
from hyperspace_vllm.core.local.slab import LoadedRow, Slab
from hyperspace_vllm.core.records import wire
from hyperspace_vllm.core.records.errors import ProtocolViolation
from hyperspace_vllm.core.records.ids import NetworkId, RowId
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import (
    CACHE_PROOF_BYTES_MAX,
    CHUNK_BYTES_MAX,
    LOCAL_MESSAGE_BYTES_MAX,
    LOOKUP_ROWS_MAX,
    PEER_CONTROL_BYTES_MAX,
    RESPONSE_BYTES_MAX,
    ROW_BYTES_MAX,
)
from hyperspace_vllm.core.records.manifest import Manifest, RowEntry, decode_manifest

KEY = bytes(range(32))
SLAB = Slab(3, 65536, 4096, 7)
QUESTION = Question(KEY, KEY, "What is ML?", KEY, True)
LAYOUT = Layout(KEY, 256, (Part(0, 4096), Part(512, 2048)), 2)

CLIENT_MESSAGES: list[ClientMessage] = [
    Hello(1, "worker", bytes(16), "host-1-0"),
    Heartbeat(),
    Goodbye(),
    RegisterLayout(LAYOUT, bytes(16)),
    WantStaging(4096, 8),
    RowStaged("r", 0, 0, 0, SLAB),
    StagingUnused(SLAB),
    SegmentNamed("r", 0, KEY, "network"),
    RequestEnded("r"),
    LookupPrefix(1, "r", (KEY, KEY), 0, 100, 1000, "private"),
    ReleaseLookup(1),
    PrefixesInMemory(1000, (KEY,), (KEY, KEY)),
    StoreResponse(KEY, "public", KEY, "0.32.0", 1000, b"{}", QUESTION),
    TouchResponses((KEY,)),
    PurgeResponses((KEY, KEY)),
    GetStatus(),
    ClaimRequest(1, KEY, True),
    RequestDone(KEY),
    FindSimilar(1, QUESTION, "strict", KEY, 0.5, 100),
    SimilarChecked(KEY, QUESTION, 0.95, "strict", "yes", "no"),
    RememberQuestion(KEY, QUESTION),
    FindResponse(1, KEY, KEY, 300),
    ReleaseResponse(1),
    ResponseAudited(KEY, bytes(CACHE_PROOF_BYTES_MAX), 40, 2, bytes(SOURCE_BYTES_MAX)),
]
NODE_MESSAGES: list[NodeMessage] = [
    Welcome(1, 5, "12D3KooW", KEY, "/dev/shm/x", 1 << 20),
    HeartbeatAck(5, 2),
    RequestClaimed(1, False),
    ClaimEnded(1),
    LeaseLost(),
    StagingGranted(4096, (SLAB,)),
    PrefixAnswer(1, 1, (LoadedRow(0, 0, 0, SLAB),), "network", "blake3", "hit"),
    Status(b"{}"),
    Rejected("no"),
    SimilarFound(1, KEY, 0.95, "check"),
    SimilarNotFound(1, "far"),
    ResponseHint(1, True),
    ResponseFound(1, b"{}", b"proof", 1, 2, "12D3KooW", "gossip", "members", True),
    ResponseToTry(1, b"{}", b"proof"),
    ResponseNotFound(1, "not_found"),
]
PEER_REQUESTS: list[wire.PeerRequest] = [
    wire.Have(1, (KEY,)),
    wire.GetManifest(1, KEY),
    wire.GetChunks(1, KEY, 0, (0, 63)),
    wire.Cancel(1),
]
PEER_REPLIES: list[wire.PeerReply] = [
    wire.HaveReply(1, (wire.Offer(0, KEY, 31, bytes(8)),)),
    wire.ManifestReply(1, b"m", b"d", bytes(48)),
    wire.Chunk(1, 63, CHUNK_BYTES_MAX),
    wire.NotHere(1, "busy"),
]
MANIFEST = Manifest(
    NetworkId(KEY), KEY, 768, bytes(12), bytes(48), KEY, 1, (RowEntry(RowId(KEY), 1000, bytes(16)),), bytes(64)
)

Decoder = Callable[[bytes], object]
DECODERS: dict[str, tuple[Decoder, list[bytes]]] = {
    "client": (decode_client_message, [encode(m) for m in CLIENT_MESSAGES]),
    "node": (decode_node_message, [encode(m) for m in NODE_MESSAGES]),
    "request": (wire.decode_request, [wire.encode(m) for m in PEER_REQUESTS]),
    "reply": (wire.decode_reply, [wire.encode(m) for m in PEER_REPLIES]),
    "manifest": (decode_manifest, [MANIFEST.encode()]),
}
unhurried = settings(deadline=None)  # a busy machine is no bug of a decoder
decoders = pytest.mark.parametrize("name", DECODERS)


def decodes_or_violates(decode: Decoder, raw: bytes) -> None:
    with contextlib.suppress(ProtocolViolation):
        decode(raw)


@pytest.mark.parametrize("message", CLIENT_MESSAGES, ids=lambda m: type(m).__name__)
def test_every_client_message_survives_the_socket(message: ClientMessage) -> None:
    assert decode_client_message(encode(message)) == message


@pytest.mark.parametrize("message", NODE_MESSAGES, ids=lambda m: type(m).__name__)
def test_every_node_message_survives_the_socket(message: NodeMessage) -> None:
    assert decode_node_message(encode(message)) == message


def test_every_message_type_is_covered() -> None:
    for union, samples in (
        (ClientMessage, CLIENT_MESSAGES),
        (NodeMessage, NODE_MESSAGES),
        (wire.PeerRequest, PEER_REQUESTS),
        (wire.PeerReply, PEER_REPLIES),
    ):
        assert set(union.__args__) == {type(sample) for sample in samples}


@decoders
@unhurried
@given(raw=st.binary(max_size=600))
def test_any_bytes_decode_or_violate(name: str, raw: bytes) -> None:
    decodes_or_violates(DECODERS[name][0], raw)


@decoders
@unhurried
@given(data=st.data())
def test_a_damaged_message_decodes_or_violates(name: str, data: st.DataObject) -> None:
    decode, samples = DECODERS[name]
    raw = bytearray(data.draw(st.sampled_from(samples)))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    decodes_or_violates(decode, bytes(raw))
    decodes_or_violates(decode, bytes(raw[:cut]))


msgpack_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ["client", "node", "request", "reply"])
@unhurried
@given(data=st.data())
def test_a_message_with_a_wrong_field_decodes_or_violates(name: str, data: st.DataObject) -> None:
    decode, samples = DECODERS[name]
    fields = msgspec.msgpack.decode(data.draw(st.sampled_from(samples)))
    fields[data.draw(st.sampled_from([*fields, "extra"]))] = data.draw(msgpack_values)
    decodes_or_violates(decode, msgspec.msgpack.encode(fields))


def altered(message: object, **fields: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.to_builtins(message, builtin_types=(bytes,)) | fields)


SLAB_FIELDS = {"slot": 1, "offset": 0, "length": 1, "generation": 0}


@pytest.mark.parametrize(
    "frame",
    [
        altered(CLIENT_MESSAGES[0], session=bytes(15)),
        altered(CLIENT_MESSAGES[0], role="root"),
        altered(CLIENT_MESSAGES[0], name="n" * 257),
        altered(CLIENT_MESSAGES[0], extra=1),
        altered(CLIENT_MESSAGES[4], count=1025),
        altered(CLIENT_MESSAGES[4], row_bytes=0),
        altered(CLIENT_MESSAGES[4], row_bytes=ROW_BYTES_MAX + 1),
        altered(CLIENT_MESSAGES[5], slab=SLAB_FIELDS | {"length": ROW_BYTES_MAX + 1}),
        altered(CLIENT_MESSAGES[5], slab=SLAB_FIELDS | {"offset": 1 << 63}),
        altered(CLIENT_MESSAGES[5], slab=SLAB_FIELDS | {"generation": -1}),
        altered(CLIENT_MESSAGES[9], segment_keys=()),
        altered(CLIENT_MESSAGES[9], segment_keys=(KEY,) * 4097),
        altered(CLIENT_MESSAGES[9], deadline_ms=1 << 32),
        altered(CLIENT_MESSAGES[11], body=bytes(RESPONSE_BYTES_MAX + 1)),
        altered(CLIENT_MESSAGES[12], request_keys=(KEY,) * 4097),
        altered(CLIENT_MESSAGES[3], layout={"fingerprint": KEY, "segment_tokens": 256, "parts": [], "ranks": 1}),
        altered(CLIENT_MESSAGES[14], request_key=KEY[:31]),
        altered(CLIENT_MESSAGES[14], model_digest=b""),
        altered(CLIENT_MESSAGES[14], deadline_ms=-1),
        altered(CLIENT_MESSAGES[15], lookup=1 << 32),
        altered(CLIENT_MESSAGES[-1], request_key=KEY[:31]),
        altered(CLIENT_MESSAGES[-1], proof=bytes(CACHE_PROOF_BYTES_MAX + 1)),
        altered(CLIENT_MESSAGES[-1], far=1 << 32),
        bytes(LOCAL_MESSAGE_BYTES_MAX + 1),
    ],
    ids=range(24),
)
def test_client_messages_out_of_bounds_are_violations(frame: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_client_message(frame)


@pytest.mark.parametrize(
    "frame",
    [
        altered(NODE_MESSAGES[7], hinted=1),
        altered(NODE_MESSAGES[8], body=bytes(RESPONSE_BYTES_MAX + 1)),
        altered(NODE_MESSAGES[8], proof=bytes(CACHE_PROOF_BYTES_MAX + 1)),
        altered(NODE_MESSAGES[8], expires_at_ms=1 << 63),
        altered(NODE_MESSAGES[8], source="s" * 257),
        altered(NODE_MESSAGES[9], reason=None),
        bytes(LOCAL_MESSAGE_BYTES_MAX + 1),
    ],
    ids=range(7),
)
def test_node_messages_out_of_bounds_are_violations(frame: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_node_message(frame)


def test_the_largest_response_that_may_be_found_fits_into_a_message() -> None:
    name = "\N{GRINNING FACE}" * NAME_CHARS_MAX
    found = ResponseFound(
        (1 << 32) - 1,
        bytes(RESPONSE_BYTES_MAX),
        bytes(CACHE_PROOF_BYTES_MAX),
        (1 << 63) - 1,
        (1 << 63) - 1,
        name,
        name,
        name,
        True,
    )
    assert decode_node_message(encode(found)) == found


@pytest.mark.parametrize(
    "frame",
    [
        altered(PEER_REQUESTS[0], row_ids=()),
        altered(PEER_REQUESTS[0], row_ids=(KEY,) * (LOOKUP_ROWS_MAX + 1)),
        altered(PEER_REQUESTS[2], columns=(64,)),
        altered(PEER_REQUESTS[2], columns=(*range(64), 0)),
        altered(PEER_REQUESTS[2], row=32),
        bytes(PEER_CONTROL_BYTES_MAX + 1),
    ],
    ids=range(6),
)
def test_peer_requests_out_of_bounds_are_violations(frame: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        wire.decode_request(frame)


@pytest.mark.parametrize(
    "frame",
    [
        altered(PEER_REPLIES[0], offers=[{"index": LOOKUP_ROWS_MAX, "manifest": KEY, "row": 0, "columns": bytes(8)}]),
        altered(PEER_REPLIES[1], proof=bytes(47)),
        altered(PEER_REPLIES[2], size=CHUNK_BYTES_MAX + 1),
        altered(PEER_REPLIES[2], size=1 << 63),
        altered(PEER_REPLIES[3], reason="because"),
    ],
    ids=range(5),
)
def test_peer_replies_out_of_bounds_are_violations(frame: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        wire.decode_reply(frame)


def test_a_manifest_that_claims_more_than_its_chunks_hold_is_a_violation() -> None:
    raw = bytearray(MANIFEST.encode())
    length_at = len(raw) - 64 - 57
    raw[length_at : length_at + 8] = (1 << 63).to_bytes(8, "big")
    with pytest.raises(ProtocolViolation, match="row length"):
        decode_manifest(bytes(raw))


@unhurried
@given(raw=st.binary(min_size=0, max_size=400))
def test_a_manifest_that_decodes_encodes_to_the_same_bytes(raw: bytes) -> None:
    try:
        manifest = decode_manifest(raw)
    except ProtocolViolation:
        return
    assert manifest.encode() == raw
