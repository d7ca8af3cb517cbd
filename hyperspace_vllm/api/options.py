"""The options of the response-cache middleware, as the adapter reads them from the server."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..core.local.claim_messages import ClaimRequest, RequestDone
from ..core.local.messages import NodeMessage
from ..core.local.response_cache_messages import (
    FindResponse,
    PurgeResponses,
    ReleaseResponse,
    ResponseAudited,
    StoreResponse,
    TouchResponses,
)
from ..core.local.similar_messages import FindSimilar, RememberQuestion, SimilarChecked
from ..core.records.limits import RESPONSE_TTL_MS
from ..core.response.request_fields import Endpoint
from ..core.response.similar.canonical import ACRONYMS
from ..core.response.similar.semantic_key import Semantic
from .http_headers import RawHeaders

ApiMessage = (
    StoreResponse
    | TouchResponses
    | ClaimRequest
    | RequestDone
    | FindSimilar
    | SimilarChecked
    | RememberQuestion
    | FindResponse
    | ReleaseResponse
    | ResponseAudited
    | PurgeResponses
)


class NodeLink(Protocol):
    """The part of `AsyncNodeClient` that the middleware uses: messages that may be lost, and are never waited for."""

    @property
    def connected(self) -> bool:
        """Whether a node is there to store anything."""

    @property
    def api_servers(self) -> int:
        """How many API servers the node has."""

    @property
    def epoch(self) -> int:
        """Changes with every new session."""

    def send(self, message: ApiMessage) -> bool:
        """Queue a message; False when it was dropped."""

    def receive(self) -> list[NodeMessage]:
        """The node's messages that the listener has not received yet."""

    def listen(self, hear: Callable[[list[NodeMessage]], None]) -> None:
        """Call `hear` on the running loop with the node's messages, and with none when the session changes."""


def wall_clock_ms() -> int:
    """Milliseconds since 1970, as in the database and in CacheProofs."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class ResponseCacheOptions:
    """Everything but `db_path`, `model_digest` and `client` has a default for a server with one tenant.

    `db_path` None turns the cache off and leaves the signing of scopes. `model_digest` gives the 32-byte digest of
    weights, quantisation, chat template, server sampling defaults and everything else that the server adds to a
    request; None while there is none (the model's files are being read), which switches the cache off for that request.
    `weights_changes` counts how often the engine's weights began to change. `dates` is the date that the chat template
    prints now: '' if it prints none, None if it prints more than the day, and then its prompts are not cached.
    `accepts` says whether the server's request model accepts a body with these headers: the cache answers no request
    that it refuses; it is called in another thread for a large body.
    """

    db_path: Path | None
    model_digest: Callable[[], bytes | None]
    client: NodeLink
    served_models: frozenset[str] = frozenset()  # names of the base model
    weights_changes: Callable[[], int] = lambda: 0
    dates: Callable[[], str | None] = lambda: ""
    accepts: Callable[[Endpoint, bytes, RawHeaders], bool] = lambda endpoint, body, headers: True
    parses: bool = False  # the server parses tool calls or reasoning from the model's output
    loras: Mapping[str, bytes] = field(default_factory=dict)  # adapter name -> digest of its files; may be updated
    api_keys: tuple[str, ...] = ()  # the server's; () when its tenants share
    fleet_secret: bytes = b""  # the same on all servers: makes tenants of API keys
    process_secret: bytes = b""  # the same in all processes of this server: signs scopes for the connector
    engine_version: str = ""
    force_include_usage: bool = False  # vLLM's --enable-force-include-usage: streams are not cached then
    store_streams: bool = True  # False where a stream lacks what a JSON answer has (--enable-return-routed-experts)
    sees_aborts: bool = True  # False: vLLM does not report when the engine aborts a Response (aborts.py)
    keeps_responses: bool = False  # VLLM_ENABLE_RESPONSES_API_STORE: a client may come back for a response by its id
    audits: bool = True  # may greedy answers of other nodes be scored? Not where logits are bent, or prompts dated
    names_proxies: bool = False  # the operator has named the proxies to trust (client_source.py)
    cache_sampled: bool = True  # False: requests that sample without a seed are not cached
    semantic: Semantic = "off"  # may a stored answer serve other wordings of its question, and how near must they be?
    max_error: float = 1.0  # share of semantic hits that may be wrong; 1: any
    acronyms: Mapping[str, str] = field(default_factory=lambda: ACRONYMS)
    ttl_ms: int = RESPONSE_TTL_MS
    read_deadline_s: float = 0.25  # for the database; a disk that hangs is a miss
    body_deadline_s: float = 1.0  # a step of reading a large body; half for its turns (large_bodies.py)
    network_deadline_s: float = 0.3  # for other nodes, where a request waits for them; 0: they aren't asked
    follow_deadline_s: float = 30.0  # without a frame from the computation that a request waits for
    stalled_stream_s: float = 300.0  # without another one: such a stream can only be cut off, and an engine may pause
    clock: Callable[[], int] = wall_clock_ms
