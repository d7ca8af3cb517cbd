"""Messages between a client in an engine process and the node of its host, over the ipc:// socket.

msgpack, decoded by msgspec straight into these types: a wrong type, a missing field or a size beyond its bound is a
`ProtocolViolation`. Times on this socket are durations (`*_ms`), never clock readings: the two processes share a
machine, not a clock of the same epoch. Moments of the wall clock (`*_at_ms`) are those that a CacheProof states.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..records.codec import decode_frame
from ..records.layout import Layout
from ..records.limits import (
    CACHE_PROOF_BYTES_MAX,
    LOCAL_MESSAGE_BYTES_MAX,
    LOOKUP_ROWS_MAX,
    PROMPT_SEGMENTS_MAX,
    QUESTION_CHARS_MAX,
    RESPONSE_BYTES_MAX,
    ROW_BYTES_MAX,
    VRAM_SEGMENTS_MAX,
    KiB,
)

LOCAL_PROTOCOL = 8
PAGE_BYTES = 64 * KiB  # of the arena: a slab takes whole ones
NAME_CHARS_MAX = 256
PURGED_KEYS_MAX = 4096
SOURCE_BYTES_MAX = 16
NO_ENGINE = bytes(16)
ANSWER_CHARS_MAX = 8192  # far more than an embedder reads

Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Name = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
U16 = Annotated[int, Meta(ge=0, le=(1 << 16) - 1)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Scope = Literal["private", "network", "public"]
Similarity = Annotated[float, Meta(ge=-1.01, le=1.01)]  # a cosine, of vectors that were rounded
AnswerText = Annotated[str, Meta(max_length=ANSWER_CHARS_MAX)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    pass


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


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request asks, as far as others may ask the same in other words.

    `partition` names everything else about the request, its tenant included: only questions of one partition are
    compared. `canonical_key` is that of its normalised form (core/response/similar/semantic_key.py). `source` names
    the tenant and the weights, for which wrong matches are counted; `is_greedy`: the engine would answer
    the same again.
    """

    partition: Bytes32
    canonical_key: Bytes32
    text: Annotated[str, Meta(max_length=QUESTION_CHARS_MAX)]
    source: Bytes32
    is_greedy: bool


# --- client to node -----------------------------------------------------------------------------


class Hello(_Message, tag="hello", frozen=True):
    """First message of a session; `session` is 16 random bytes, new in every process and after a lost lease."""

    protocol: U32
    role: Literal["api", "scheduler", "worker", "cli"]
    session: Bytes16
    name: Name


class Heartbeat(_Message, tag="heartbeat", frozen=True):
    """Keeps the session's lease: every HEARTBEAT_MS, expires after LEASE_MS."""


class Goodbye(_Message, tag="goodbye", frozen=True):
    """Ends the session at once; everything it leased is free, staged rows that weren't named are dropped."""


class RegisterLayout(_Message, tag="layout", frozen=True):
    """From schedulers and workers, before anything that depends on it.

    `engine` is 16 random bytes that a scheduler draws and hands its workers with each step's work: the node joins rows
    to names by it, because names of clients and ids of requests may be equal in two engines. A worker that has not
    heard from its scheduler yet sends NO_ENGINE.
    """

    layout: Layout
    engine: Bytes16


class WantStaging(_Message, tag="want_staging", frozen=True):
    """A worker asks for `count` staging slabs of `row_bytes`.

    Answered by StagingGranted with as many as fit; the others are granted when there is room, until it asks again.
    """

    row_bytes: Annotated[int, Meta(ge=1, le=ROW_BYTES_MAX)]
    count: Annotated[int, Meta(ge=1, le=1024)]


class RowStaged(_Message, tag="row_staged", frozen=True):
    """A worker filled a granted slab with one row; it becomes the node's. `request_id` as in SegmentNamed."""

    request_id: Name
    segment: U32
    part: U32
    rank: U32
    slab: Slab


class StagingUnused(_Message, tag="staging_unused", frozen=True):
    """A worker returns a granted slab unwritten."""

    slab: Slab


class SegmentNamed(_Message, tag="segment_named", frozen=True):
    """The scheduler names a staged segment, once its last token is known. `scope` limits who may fetch it.

    `request_id` is the scheduler's own, never used twice by one engine.
    """

    request_id: Name
    segment: U32
    segment_key: Bytes32
    scope: Scope


class RequestEnded(_Message, tag="request_ended", frozen=True):
    """The scheduler will name no more segments of the request and reads no more of its loaded rows."""

    request_id: Name


class LookupPrefix(_Message, tag="lookup_prefix", frozen=True):
    """Find, fetch, verify and lease the rows of the longest usable prefix.

    `segment_keys[i]` is the key of segment i, from 0, as many as whole segments fit into prompt - 1 tokens;
    `start_token` tokens are in the engine already; `prefill_ms` estimates computing the rest (0: unknown).
    The answer (PrefixAnswer) comes within `deadline_ms`; the client stops waiting by its own clock too.
    """

    lookup: U32
    request_id: Name
    segment_keys: Annotated[tuple[Bytes32, ...], Meta(min_length=1, max_length=PROMPT_SEGMENTS_MAX)]
    start_token: U32
    prefill_ms: U32
    deadline_ms: U32
    scope: Scope


class ReleaseLookup(_Message, tag="release_lookup", frozen=True):
    """Cancels a lookup that is under way, or ends the lease on the rows of its answer."""

    lookup: U32


class PrefixesInMemory(_Message, tag="prefixes_in_memory", frozen=True):
    """From a scheduler, at most once a second: its load, and the change of what lies whole in its engine's KV cache.

    `load_permille`: requests that run or wait, in thousandths of those that can run at once. `gone` counts before
    `come`; neither holds a segment that mustn't leave the node. A session begins with nothing in memory.
    """

    load_permille: U16
    come: Annotated[tuple[Bytes32, ...], Meta(max_length=VRAM_SEGMENTS_MAX)]
    gone: Annotated[tuple[Bytes32, ...], Meta(max_length=VRAM_SEGMENTS_MAX)]


class StoreResponse(_Message, tag="store_response", frozen=True):
    """Store a finished response; the node signs its CacheProof. Nothing is answered.

    With a `question` it may answer questions like it as well.
    """

    request_key: Bytes32
    scope: Scope
    model_digest: Bytes32
    engine_version: Name
    ttl_ms: U63
    body: Annotated[bytes, Meta(max_length=RESPONSE_BYTES_MAX)]
    question: Question | None = None


class TouchResponses(_Message, tag="touch_responses", frozen=True):
    """Hits since the last such message, for LRU and popularity."""

    request_keys: Annotated[tuple[Bytes32, ...], Meta(max_length=4096)]


class PurgeResponses(_Message, tag="purge_responses", frozen=True):
    """Delete these responses. Nothing is answered: the database shows when it is done."""

    request_keys: Annotated[tuple[Bytes32, ...], Meta(max_length=PURGED_KEYS_MAX)]


class ResponseAudited(_Message, tag="response_audited", frozen=True):
    """An API server had its engine score another node's response: of `tokens` tokens `far` are far from the arg-max.

    `far` 0: passed. `proof` is the one that came with the response, `source` what the client that asked for it can't be
    twice ('' unknown). Nothing is answered.
    """

    request_key: Bytes32
    proof: Annotated[bytes, Meta(max_length=CACHE_PROOF_BYTES_MAX)]
    tokens: U32
    far: U32
    source: Annotated[bytes, Meta(max_length=SOURCE_BYTES_MAX)] = b""


class ClaimRequest(_Message, tag="claim_request", frozen=True):
    """An API server is about to compute a request: unless another is at it already, the lease is its own.

    `waits`: it would rather wait for that other one's answer. Then RequestClaimed answers at once; if it isn't granted,
    ClaimEnded follows. `claim` is unique among the session's unfinished ones and its lookups.
    """

    claim: U32
    request_key: Bytes32
    waits: bool


class RequestDone(_Message, tag="request_done", frozen=True):
    """The holder of the lease has ended; if it has an answer, a StoreResponse came before this."""

    request_key: Bytes32


class FindSimilar(_Message, tag="find_similar", frozen=True):
    """Find a stored response of the question's partition that answers the question too, by `mode`'s guards.

    At most the share `max_error` of what is found for this model and mode may be wrong. `lookup` is unique among the
    session's unfinished ones, FindResponse's included. Answered by SimilarFound or SimilarNotFound; after `deadline_ms`
    nobody listens.
    """

    lookup: U32
    question: Question
    mode: Literal["strict", "balanced"]
    model_digest: Bytes32
    max_error: Annotated[float, Meta(ge=0, le=1)]
    deadline_ms: U32


class SimilarChecked(_Message, tag="similar_checked", frozen=True):
    """A match for `question` was computed as well: the answer that is stored under `request_key`, and the engine's.

    `similarity` is that of the match, 1 for canonical forms that are equal. Nothing is answered.
    """

    request_key: Bytes32
    question: Question
    similarity: Similarity
    mode: Literal["strict", "balanced"]
    stored: AnswerText
    computed: AnswerText


class RememberQuestion(_Message, tag="remember_question", frozen=True):
    """The question that a response from another node answers, which the node is storing. Nothing is answered."""

    request_key: Bytes32
    question: Question


class FindResponse(_Message, tag="find_response", frozen=True):
    """Ask other nodes for a response that this one lacks; never sent for a request that must not leave the node.

    `lookup` is unique among the session's unfinished response lookups. Answered by ResponseHint,
    at once, and within `deadline_ms` by ResponseFound or ResponseNotFound, which ends it.
    """

    lookup: U32
    request_key: Bytes32
    model_digest: Bytes32
    deadline_ms: U32


class ReleaseResponse(_Message, tag="release_response", frozen=True):
    """Nobody waits for the lookup any more: it is over, unanswered. What it still finds may be stored."""

    lookup: U32


class GetStatus(_Message, tag="get_status", frozen=True):
    """Ask for what `hyperspace status` shows."""


ClientMessage = (
    Hello
    | Heartbeat
    | Goodbye
    | RegisterLayout
    | WantStaging
    | RowStaged
    | StagingUnused
    | SegmentNamed
    | RequestEnded
    | LookupPrefix
    | ReleaseLookup
    | PrefixesInMemory
    | StoreResponse
    | TouchResponses
    | PurgeResponses
    | ResponseAudited
    | ClaimRequest
    | RequestDone
    | FindSimilar
    | SimilarChecked
    | RememberQuestion
    | FindResponse
    | ReleaseResponse
    | GetStatus
)

# --- node to client -----------------------------------------------------------------------------


class Welcome(_Message, tag="welcome", frozen=True):
    """Answers Hello. `epoch` is random per node process: a new one means that everything leased is gone."""

    protocol: U32
    epoch: U63
    peer_id: Name
    network_id: Bytes32
    arena_path: Annotated[str, Meta(max_length=4096)]
    arena_bytes: U63


class HeartbeatAck(_Message, tag="heartbeat_ack", frozen=True):
    """The lease holds. `api_servers`: sessions of that role, this one included if it is one."""

    epoch: U63
    api_servers: U16


class LeaseLost(_Message, tag="lease_lost", frozen=True):
    """The session is unknown or expired: forget every slab and say Hello with a new session."""


class StagingGranted(_Message, tag="staging_granted", frozen=True):
    """Slabs that this session, and nobody else, may write until it stages or returns them."""

    row_bytes: U63
    slabs: Annotated[tuple[Slab, ...], Meta(max_length=1024)]


class LoadedRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One verified row, readable until the lookup is released."""

    segment: U32
    part: U32
    rank: U32
    slab: Slab


class PrefixAnswer(_Message, tag="prefix_answer", frozen=True):
    """`end_segment` segments of the prompt are usable (0: none, `reason` says why); all `rows` are verified.

    `source` names where the slowest row came from; `verified_by` the checks that it passed.
    """

    lookup: U32
    end_segment: U32
    rows: Annotated[tuple[LoadedRow, ...], Meta(max_length=LOOKUP_ROWS_MAX)]
    source: Literal["none", "memory", "disk", "network"]
    verified_by: Name
    reason: Name


class RequestClaimed(_Message, tag="request_claimed", frozen=True):
    """Whether the lease is granted; if not, its holder's end will be told."""

    claim: U32
    granted: bool


class ClaimEnded(_Message, tag="request_over", frozen=True):
    """The holder has ended: its answer is in the database in a moment, or never."""

    claim: U32


class SimilarFound(_Message, tag="similar_found", frozen=True):
    """The response of `request_key`, in this node's database, answers the question too.

    `similarity` is the cosine, the larger of that of the questions as asked and of their canonical forms. `verdict`:
    serve it; serve it and compute another to `check` it; or don't serve, `compute`, and check (SimilarChecked).
    """

    lookup: U32
    request_key: Bytes32
    similarity: Similarity
    verdict: Literal["serve", "check", "compute"]


class SimilarNotFound(_Message, tag="similar_not_found", frozen=True):
    """None does. `reason`: off (asking again soon is useless), busy, far, or the guard that refused the nearest."""

    lookup: U32
    reason: Name


class ResponseHint(_Message, tag="response_hint", frozen=True):
    """Whether somebody is known to have the response: then it is worth waiting for, else worth a race at most."""

    lookup: U32
    hinted: bool


class ResponseFound(_Message, tag="response_found", frozen=True):
    """Another node's response, opened and verified, and about to be stored here.

    `computed_by` is the peer id of the proof's signer, `source` says how its provider was found, `verified_by` names
    the checks that it passed. `suspect`: the signer is said to have signed false answers; audit this one.
    """

    lookup: U32
    body: Annotated[bytes, Meta(max_length=RESPONSE_BYTES_MAX)]
    proof: Annotated[bytes, Meta(max_length=CACHE_PROOF_BYTES_MAX)]
    computed_at_ms: U63
    expires_at_ms: U63
    computed_by: Name
    source: Name
    verified_by: Name
    suspect: bool = False


class ResponseToTry(_Message, tag="response_to_try", frozen=True):
    """Another node's response that holds but for its signer, which isn't trusted: to be audited, and never served.

    It doesn't end the lookup.
    """

    lookup: U32
    body: Annotated[bytes, Meta(max_length=RESPONSE_BYTES_MAX)]
    proof: Annotated[bytes, Meta(max_length=CACHE_PROOF_BYTES_MAX)]


class ResponseNotFound(_Message, tag="response_not_found", frozen=True):
    """The lookup is over. `reason`: off | alone | no_peers (asking again soon is useless), busy, not_found, …"""

    lookup: U32
    reason: Name


class Status(_Message, tag="status", frozen=True):
    """The node's status as a JSON document."""

    json: Annotated[bytes, Meta(max_length=RESPONSE_BYTES_MAX)]


class Rejected(_Message, tag="rejected", frozen=True):
    """The last message broke the protocol; `detail` names the field."""

    detail: Name


NodeMessage = (
    Welcome
    | HeartbeatAck
    | LeaseLost
    | StagingGranted
    | PrefixAnswer
    | RequestClaimed
    | ClaimEnded
    | SimilarFound
    | SimilarNotFound
    | ResponseHint
    | ResponseToTry
    | ResponseFound
    | ResponseNotFound
    | Status
    | Rejected
)

_encoder = msgspec.msgpack.Encoder()
_client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_node_decoder: msgspec.msgpack.Decoder[NodeMessage] = msgspec.msgpack.Decoder(NodeMessage)


def encode(message: ClientMessage | NodeMessage) -> bytes:
    """One frame on the local socket."""
    return _encoder.encode(message)


def decode_client_message(frame: bytes | memoryview) -> ClientMessage:
    """What a client sent; `ProtocolViolation` names the field that is wrong."""
    return decode_frame(_client_decoder, frame, LOCAL_MESSAGE_BYTES_MAX, "local message")


def decode_node_message(frame: bytes | memoryview) -> NodeMessage:
    """What the node sent; `ProtocolViolation` names the field that is wrong."""
    return decode_frame(_node_decoder, frame, LOCAL_MESSAGE_BYTES_MAX, "node message")
