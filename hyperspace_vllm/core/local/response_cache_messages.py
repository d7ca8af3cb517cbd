"""Responses between an API server and its node: stored, looked up at other nodes, audited, deleted."""

from typing import Annotated

from msgspec import Meta

from ..records.limits import CACHE_PROOF_BYTES_MAX, RESPONSE_BYTES_MAX
from .message_fields import U32, U63, Bytes32, LocalMessage, Name, Scope
from .similar_messages import Question

PURGED_KEYS_MAX = 4096
SOURCE_BYTES_MAX = 16


class StoreResponse(LocalMessage, tag="store_response", frozen=True):
    """Store a finished response; the node signs its CacheProof. Not answered.

    With a `question` it may also answer similar questions.
    """

    request_key: Bytes32
    scope: Scope
    model_digest: Bytes32
    engine_version: Name
    ttl_ms: U63
    body: Annotated[bytes, Meta(max_length=RESPONSE_BYTES_MAX)]
    question: Question | None = None


class TouchResponses(LocalMessage, tag="touch_responses", frozen=True):
    """Hits since the last such message, for LRU and popularity."""

    request_keys: Annotated[tuple[Bytes32, ...], Meta(max_length=4096)]


class PurgeResponses(LocalMessage, tag="purge_responses", frozen=True):
    """Delete these responses. Not answered: the database shows when it is done."""

    request_keys: Annotated[tuple[Bytes32, ...], Meta(max_length=PURGED_KEYS_MAX)]


class FindResponse(LocalMessage, tag="find_response", frozen=True):
    """Ask other nodes for a response that this one lacks; never sent for a request that must not leave the node.

    `lookup` is unique among the session's unfinished response lookups. Answered by ResponseHint,
    at once, and within `deadline_ms` by ResponseFound or ResponseNotFound, which ends it.
    """

    lookup: U32
    request_key: Bytes32
    model_digest: Bytes32
    deadline_ms: U32


class ResponseHint(LocalMessage, tag="response_hint", frozen=True):
    """Whether a peer is known to have the response: then the request waits, otherwise the lookup races the engine."""

    lookup: U32
    hinted: bool


class ResponseFound(LocalMessage, tag="response_found", frozen=True):
    """Another node's response, opened and verified, and about to be stored here.

    `computed_by` is the peer id of the proof's signer, `source` says how its provider was found, `verified_by` names
    the checks that it passed. `suspect`: the signer is accused of signing false answers; audit this one.
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


class ResponseToTry(LocalMessage, tag="response_to_try", frozen=True):
    """Another node's response that is valid except that its signer is not trusted: audit it, and never serve it.

    It does not end the lookup.
    """

    lookup: U32
    body: Annotated[bytes, Meta(max_length=RESPONSE_BYTES_MAX)]
    proof: Annotated[bytes, Meta(max_length=CACHE_PROOF_BYTES_MAX)]


class ResponseNotFound(LocalMessage, tag="response_not_found", frozen=True):
    """The lookup is over. `reason`: off | alone | no_peers (asking again soon is useless), busy, not_found, …"""

    lookup: U32
    reason: Name


class ReleaseResponse(LocalMessage, tag="release_response", frozen=True):
    """No request waits for the lookup any more: it ends without an answer. A response that it still finds is stored."""

    lookup: U32


class ResponseAudited(LocalMessage, tag="response_audited", frozen=True):
    """An API server had its engine score another node's response: of `tokens` tokens `far` are far from the arg-max.

    `far` 0: passed. `proof` is the one that came with the response, `source` the source of the client that asked for it
    (core/peers/findings.py; '' unknown). Not answered.
    """

    request_key: Bytes32
    proof: Annotated[bytes, Meta(max_length=CACHE_PROOF_BYTES_MAX)]
    tokens: U32
    far: U32
    source: Annotated[bytes, Meta(max_length=SOURCE_BYTES_MAX)] = b""
