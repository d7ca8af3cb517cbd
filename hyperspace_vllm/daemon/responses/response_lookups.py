"""The answers to lookups of other nodes' responses that clients of this host wait for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ...core.local.message_fields import NAME_CHARS_MAX
from ...core.local.messages import NodeMessage
from ...core.local.response_cache_messages import ResponseFound, ResponseHint, ResponseNotFound, ResponseToTry
from ...core.records.ids import RequestKey
from ..lookup_numbers import LookupNumbers


class ResponseFinder(Protocol):
    """Asks other nodes. It answers by `Clients`, at once or later."""

    def find(self, lookup: int, request_key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
        """Begin a lookup; `lookup` is unique in this process's life, `deadline_ms` a duration."""

    def release(self, lookup: int) -> None:
        """No client waits for the lookup any more; an answer would be ignored."""

    def used(self, keys: Iterable[bytes]) -> None:
        """Count hits of this host's clients: a popular response is fetched and kept by more nodes."""

    def purge(self, keys: Iterable[bytes]) -> None:
        """Delete entries everywhere this node has stored them."""


@dataclass(frozen=True, slots=True)
class FoundResponse:
    """The response of a lookup; the fields are those of `ResponseFound`."""

    body: bytes
    proof: bytes
    computed_at_ms: int
    expires_at_ms: int
    computed_by: str
    source: str
    verified_by: str
    suspect: bool = False


class Clients(Protocol):
    """Where lookups are answered (ResponseLookups)."""

    def hint(self, lookup: int, hinted: bool) -> None:
        """Report whether a peer is known to have the response."""

    def let_try(self, lookup: int, body: bytes, proof: bytes) -> None:
        """Have a response audited that is not served."""

    def answer(self, lookup: int, found: FoundResponse | None, reason: str) -> None:
        """End a lookup."""


class ResponseLookups:
    """Answers lookups. `send` queues a message for the client at a route."""

    def __init__(self, send: Callable[[bytes, NodeMessage], bool]) -> None:
        self._send = send
        self.numbers = LookupNumbers()

    def hint(self, lookup: int, hinted: bool) -> None:
        """Tell the client whether there is a hint; a released lookup is ignored."""
        if (client := self.numbers.client(lookup)) is not None:
            route, client_lookup = client
            self._send(route, ResponseHint(client_lookup, hinted))

    def let_try(self, lookup: int, body: bytes, proof: bytes) -> None:
        """Have the client audit a response that it does not serve; a released lookup is ignored."""
        if (client := self.numbers.client(lookup)) is not None:
            route, client_lookup = client
            self._send(route, ResponseToTry(client_lookup, body, proof))

    def answer(self, lookup: int, found: FoundResponse | None, reason: str) -> None:
        """End the lookup with its response, or with the reason why there is none; a released lookup is ignored."""
        if (client := self.numbers.client(lookup)) is None:
            return
        route, client_lookup = client
        self.numbers.forget(lookup)
        if found is None:
            self._send(route, ResponseNotFound(client_lookup, reason[:NAME_CHARS_MAX]))
            return
        self._send(
            route,
            ResponseFound(
                client_lookup,
                found.body,
                found.proof,
                found.computed_at_ms,
                found.expires_at_ms,
                found.computed_by[:NAME_CHARS_MAX],
                found.source[:NAME_CHARS_MAX],
                found.verified_by[:NAME_CHARS_MAX],
                found.suspect,
            ),
        )
