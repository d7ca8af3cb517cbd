"""The facts of a request for this server: read once, and never changed."""

from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from ..core.response.admission import storage_scope
from ..core.response.answer_ids import named_by
from ..core.response.request_fields import POOLING, Endpoint
from ..core.response.request_key import is_sampled
from ..core.response.scope import RequestScope, api_key_of, engine_salt, tenant_of
from ..core.response.similar.guards import Mode
from ..core.response.similar.semantic_key import tightened
from .http_headers import PROOF, Directives, first_header, header, parse_cache_control
from .options import ResponseCacheOptions
from .own_ids import OwnIds

# How the engine serves a request: a request that sets one shares no computation with others.
_SERVED_BY = ("priority", "stream_interval")
_SERVED_BY_HEADERS = (b"x-vllm-priority", b"x-data-parallel-rank")


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """One request, as the cache reads it.

    `tenant` is None for an unknown one, `salt` separates its KV in the engine, `reach` says how far its answer may
    travel, `mode` how near another wording must be (None: no other wording), `named` is the client's id for the
    request. `repeated` are fields that its answer repeats.
    """

    endpoint: Endpoint
    raw: bytes
    body: dict[str, Any]
    scope: Scope
    wishes: Directives
    wants_proof: bool
    tenant: str | None
    salt: object
    reach: RequestScope
    mode: Mode | None
    named: str | None
    streams: bool
    chooses_usage: bool  # without it, streams always end with usage
    wants_usage: bool
    repeated: dict[str, Any]

    @property
    def first_sample_stays(self) -> bool:
        """Whether the answer is sampled and cached: then no client may replace the stored one."""
        return is_sampled(self.endpoint, self.body)

    def own_ids(self) -> OwnIds:
        """Ids for an answer that was not computed for this request."""
        return OwnIds(self.endpoint, self.named)

    def served_by(self) -> tuple[object, ...]:
        """The client's scheduling options for the engine; all None for none."""
        headers = self.scope["headers"]
        fields = (self.body.get(name) or None for name in _SERVED_BY)  # a priority of 0 is the default
        return (*fields, *(first_header(headers, name) for name in _SERVED_BY_HEADERS))


def facts_of(
    options: ResponseCacheOptions, endpoint: Endpoint, raw: bytes, body: dict[str, Any], scope: Scope
) -> RequestFacts:
    """The facts of a request whose JSON is `body`."""
    headers = scope["headers"]
    wishes = parse_cache_control(header(headers, b"cache-control"))
    authorization = first_header(headers, b"authorization")
    tenant = tenant_of(options.fleet_secret, options.api_keys, authorization)
    marked_private = wishes.private or wishes.no_store or endpoint == "embeddings"
    streams = endpoint not in POOLING and bool(body.get("stream"))
    chooses_usage = streams and endpoint in ("completions", "chat")
    stream_options = body.get("stream_options")
    repeats = ("metadata", "user") if endpoint == "responses" else ()
    return RequestFacts(
        endpoint=endpoint,
        raw=raw,
        body=body,
        scope=scope,
        wishes=wishes,
        wants_proof=header(headers, PROOF) is not None,
        tenant=tenant,
        salt=engine_salt(api_key_of(options.api_keys, authorization), body.get("cache_salt")),
        reach=storage_scope(tenant or "", body.get("cache_salt"), marked_private),
        mode=tightened(options.semantic, header(headers, b"x-hyperspace-semantic")),
        named=named_by(endpoint, body, first_header(headers, b"x-request-id")),
        streams=streams,
        chooses_usage=chooses_usage,
        wants_usage=chooses_usage and isinstance(stream_options, dict) and bool(stream_options.get("include_usage")),
        repeated={name: body[name] for name in repeats if body.get(name) is not None},
    )
