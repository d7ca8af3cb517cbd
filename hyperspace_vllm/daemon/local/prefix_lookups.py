"""The prefix lookups that schedulers of this host wait for: their numbers, their bound, their answers."""

from collections.abc import Callable
from itertools import count
from typing import Literal

from ...core.local.kv_messages import PrefixAnswer
from ...core.local.messages import NodeMessage
from ...core.local.slab import LoadedRow
from ...core.records.errors import ProtocolViolation
from ...core.records.limits import LOOKUPS_PER_CLIENT_MAX

_REASON_CHARS_MAX = 256  # local.Name

Source = Literal["none", "memory", "disk", "network"]


class PrefixLookups:
    """Maps a client's number of a lookup to the node's, and back. `send` queues a message for the client at a route."""

    def __init__(self, send: Callable[[bytes, NodeMessage], bool]) -> None:
        self._send = send
        self._numbers = count(1)
        self._open: dict[int, tuple[bytes, int]] = {}  # the node's number -> route, and the client's number
        self._clients: dict[bytes, dict[int, int]] = {}  # route -> the client's number -> the node's

    def begin(self, route: bytes, client_lookup: int) -> int | None:
        """The node's number of a client's new lookup; None if the client has too many."""
        theirs = self._clients.get(route, {})
        if client_lookup in theirs:
            raise ProtocolViolation(f"lookup {client_lookup}: under way already")
        if len(theirs) >= LOOKUPS_PER_CLIENT_MAX:
            return None
        lookup = next(self._numbers)
        self._open[lookup] = route, client_lookup
        self._clients.setdefault(route, theirs)[client_lookup] = lookup
        return lookup

    def release(self, route: bytes, client_lookup: int) -> int | None:
        """End a client's lookup; returns the node's number of it.

        None for an unknown one, which is no error: a miss ends by itself, and its answer may have crossed the release.
        """
        lookup = self._clients.get(route, {}).get(client_lookup)
        if lookup is not None:
            self._forget(lookup)
        return lookup

    def end(self, route: bytes) -> list[int]:
        """The client has gone: the node's numbers of its open lookups."""
        lookups = list(self._clients.get(route, {}).values())
        for lookup in lookups:
            self._forget(lookup)
        return lookups

    def answer(
        self,
        lookup: int,
        end_segment: int,
        rows: tuple[LoadedRow, ...],
        source: Source,
        verified_by: str,
        reason: str,
    ) -> bool:
        """Answer a lookup; one that was released meanwhile is ignored. The lease on `rows` is the lookup's.

        False: the client cannot be reached, and will not release the lookup.
        """
        if (opened := self._open.get(lookup)) is None:
            return True
        route, client_lookup = opened
        verified_by, reason = verified_by[:_REASON_CHARS_MAX], reason[:_REASON_CHARS_MAX]
        sent = self._send(route, PrefixAnswer(client_lookup, end_segment, rows, source, verified_by, reason))
        if end_segment == 0 or not sent:
            self._forget(lookup)
        return sent

    def _forget(self, lookup: int) -> None:
        route, client_lookup = self._open.pop(lookup)
        theirs = self._clients[route]
        del theirs[client_lookup]
        if not theirs:
            del self._clients[route]
