"""The numbers of lookups that clients of this host have open: each client's own, and this node's."""

from itertools import count

from ..core.records.errors import ProtocolViolation
from ..core.records.limits import LOOKUPS_PER_CLIENT_MAX


class LookupNumbers:
    """From a client's number of a lookup to this node's, and back. A client is known by its route in the socket."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._open: dict[int, tuple[bytes, int]] = {}  # this node's number -> the client's route and number
        self._clients: dict[bytes, dict[int, int]] = {}  # route -> the client's number -> this node's

    def begin(self, route: bytes, client_lookup: int) -> int | None:
        """This node's number of a new lookup; None if its client has too many. `ProtocolViolation` if it is open."""
        theirs = self._clients.get(route, {})
        if client_lookup in theirs:
            raise ProtocolViolation(f"lookup {client_lookup}: under way already")
        if len(theirs) >= LOOKUPS_PER_CLIENT_MAX:
            return None
        lookup = next(self._numbers)
        self._open[lookup] = route, client_lookup
        self._clients.setdefault(route, theirs)[client_lookup] = lookup
        return lookup

    def client(self, lookup: int) -> tuple[bytes, int] | None:
        """The route and number of the client that waits; None once the lookup has ended."""
        return self._open.get(lookup)

    def release(self, route: bytes, client_lookup: int) -> int | None:
        """End a client's lookup; this node's number of it.

        None for an unknown one, which is no violation: a miss ends by itself, and an answer may cross the release.
        """
        lookup = self._clients.get(route, {}).get(client_lookup)
        if lookup is not None:
            self.forget(lookup)
        return lookup

    def end(self, route: bytes) -> list[int]:
        """The client has gone: this node's numbers of what it had open."""
        lookups = list(self._clients.get(route, {}).values())
        for lookup in lookups:
            self.forget(lookup)
        return lookups

    def forget(self, lookup: int) -> None:
        """End an open lookup."""
        route, client_lookup = self._open.pop(lookup)
        theirs = self._clients[route]
        del theirs[client_lookup]
        if not theirs:
            del self._clients[route]
