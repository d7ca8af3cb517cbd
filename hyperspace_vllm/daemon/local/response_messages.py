"""Messages of API servers about responses: store, find, audit, delete, claims and similar questions."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Literal, Protocol, assert_never

import msgspec

from ...core.local.claim_messages import ClaimRequest, RequestDone
from ...core.local.messages import NodeMessage
from ...core.local.response_cache_messages import (
    FindResponse,
    PurgeResponses,
    ReleaseResponse,
    ResponseAudited,
    ResponseNotFound,
    StoreResponse,
    TouchResponses,
)
from ...core.local.similar_messages import FindSimilar, RememberQuestion, SimilarChecked, SimilarFound, SimilarNotFound
from ...core.records.ids import RequestKey
from ..responses.response_lookups import ResponseFinder, ResponseLookups
from .request_leases import RequestLeases
from .served import Served
from .session import Session

ResponseMessage = (
    StoreResponse
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
)


class Responses(Protocol):
    """The part of the response store that clients use."""

    def store(self, message: StoreResponse) -> bool:
        """Sign and store a response; never blocks (False: it is not stored)."""

    def touch(self, keys: Iterable[bytes]) -> None:
        """Count hits; never blocks."""

    def purge(self, keys: Iterable[bytes]) -> bool:
        """Delete entries; never blocks (False: the queue is full)."""


class Similar(Protocol):
    """Finds stored responses that answer another wording of a question."""

    def find(self, want: FindSimilar, answer: Callable[[SimilarFound | SimilarNotFound], None]) -> None:
        """Look for one; `answer` is called once, from any thread. Never blocks."""

    def remember(self, message: StoreResponse) -> None:
        """Have a response with a question stored; never blocks."""

    def remember_question(self, message: RememberQuestion) -> None:
        """Have a question stored with a response that is here, or about to be; never blocks."""

    def check(self, message: SimilarChecked) -> None:
        """Compare two answers; never blocks."""


class ResponseMessages:
    """Passes messages to the store, to similar questions and to the finder, which answers by `lookups`.

    `share` is how far this host's responses reach; `audited` acts on an API server's audit.
    """

    def __init__(
        self,
        share: Literal["private", "network", "public"],
        store: Responses | None,
        similar: Similar | None,
        audited: Callable[[ResponseAudited], None],
        finder: ResponseFinder | None,
        lookups: ResponseLookups,
        served: Served,
        send: Callable[[bytes, NodeMessage], bool],
    ) -> None:
        self._share = share
        self._store = store
        self._similar = similar
        self._audited = audited
        self._finder = finder
        self._lookups = lookups
        self._served = served
        self._send = send
        self._leases = RequestLeases(send)

    def handle(self, session: Session, message: ResponseMessage) -> None:
        """Act on a message; `ProtocolViolation`."""
        match message:
            case StoreResponse():
                self._served.model(session.key, message.model_digest)
                self._keep(message)
                self._leases.over(session.route, message.request_key)
            case TouchResponses(request_keys):
                if self._store is not None:
                    self._store.touch(request_keys)
                if self._finder is not None:
                    self._finder.used(request_keys)
            case PurgeResponses(request_keys):
                if self._store is not None:
                    self._store.purge(request_keys)
                self._purge_elsewhere(request_keys)
            case ResponseAudited():
                self._audited(message)
                if message.far:
                    self._purge_elsewhere((message.request_key,))
            case ClaimRequest():
                self._leases.claim(session.route, message)
            case RequestDone(request_key):
                self._leases.over(session.route, request_key)
            case FindSimilar():
                self._find_similar(session.route, message)
            case SimilarChecked():
                if self._similar is not None:
                    self._similar.check(message)
            case RememberQuestion():
                if self._similar is not None:
                    self._similar.remember_question(message)
            case FindResponse():
                self._served.model(session.key, message.model_digest)
                self._find(session.route, message)
            case ReleaseResponse(lookup):
                self._release(self._lookups.numbers.release(session.route, lookup))
            case _:
                assert_never(message)

    def ended(self, session: Session) -> None:
        """A session is over: release its lookups, and the leases for which others wait."""
        for lookup in self._lookups.numbers.end(session.route):
            self._release(lookup)
        self._leases.end(session.route)

    def _keep(self, message: StoreResponse) -> None:
        reach = self._share if message.scope == "network" else message.scope
        message = msgspec.structs.replace(message, scope=reach)
        if self._similar is not None and message.question is not None:
            self._similar.remember(message)
        elif self._store is not None:
            self._store.store(message)

    def _find(self, route: bytes, want: FindResponse) -> None:
        lookup = self._lookups.numbers.begin(route, want.lookup) if self._finder is not None else None
        if self._finder is None or lookup is None:
            self._send(route, ResponseNotFound(want.lookup, "busy" if self._finder else "off"))
        else:
            self._finder.find(lookup, RequestKey(want.request_key), want.model_digest, want.deadline_ms)

    def _release(self, lookup: int | None) -> None:
        if lookup is not None and self._finder is not None:
            self._finder.release(lookup)

    def _purge_elsewhere(self, request_keys: tuple[bytes, ...]) -> None:
        if self._finder is not None:
            self._finder.purge(request_keys)

    def _find_similar(self, route: bytes, want: FindSimilar) -> None:
        if self._similar is None:
            self._send(route, SimilarNotFound(want.lookup, "off"))
            return
        loop = asyncio.get_running_loop()

        def answer(found: SimilarFound | SimilarNotFound) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._send, route, found)

        self._similar.find(want, answer)
