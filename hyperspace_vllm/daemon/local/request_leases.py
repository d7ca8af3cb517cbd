"""Request leases: of the host's API servers with the same request, the first one computes it.

The others are notified when the lease ends: then the answer is in the database, or there is none. A lease ends by a
message of its holder, when its answer is stored, or with its session. Each waiting server has its own deadline.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ...core.local.claim_messages import ClaimEnded, ClaimRequest, RequestClaimed
from ...core.local.messages import NodeMessage
from ...core.records.limits import LOOKUPS_PER_CLIENT_MAX, REQUEST_LEASES_MAX


@dataclass(slots=True)
class _Lease:
    holder: bytes  # the route of its session
    waiting: list[tuple[bytes, int]] = field(default_factory=list)  # routes and their numbers of the claims


class RequestLeases:
    """`send` queues a message for the client at a route."""

    def __init__(self, send: Callable[[bytes, NodeMessage], bool]) -> None:
        self._send = send
        self._leases: dict[bytes, _Lease] = {}  # by RequestKey
        self._waiting: dict[bytes, int] = {}  # how many claims of a route wait

    def __len__(self) -> int:
        return len(self._leases)

    def claim(self, route: bytes, want: ClaimRequest) -> None:
        """Grant the lease, or note that this client waits; beyond the bounds the client computes on its own."""
        lease = self._leases.get(want.request_key)
        if lease is None and len(self._leases) < REQUEST_LEASES_MAX:
            self._leases[want.request_key] = _Lease(route)
        waits = lease is not None and want.waits and self._waiting.get(route, 0) < LOOKUPS_PER_CLIENT_MAX
        if lease is not None and waits:
            lease.waiting.append((route, want.claim))
            self._waiting[route] = self._waiting.get(route, 0) + 1
        if want.waits:
            self._send(route, RequestClaimed(want.claim, not waits))

    def over(self, route: bytes, request_key: bytes) -> None:
        """The holder has ended, or its answer is being stored; ignored from any other client."""
        lease = self._leases.get(request_key)
        if lease is not None and lease.holder == route:
            del self._leases[request_key]
            for waiter, claim in lease.waiting:
                self._forget(waiter)
                self._send(waiter, ClaimEnded(claim))

    def end(self, route: bytes) -> None:
        """The client has gone: end its leases and claims."""
        for key in [key for key, lease in self._leases.items() if lease.holder == route]:
            self.over(route, key)
        if self._waiting.pop(route, 0):
            for lease in self._leases.values():
                lease.waiting = [each for each in lease.waiting if each[0] != route]

    def _forget(self, route: bytes) -> None:
        left = self._waiting.get(route, 0) - 1
        if left > 0:
            self._waiting[route] = left
        else:
            self._waiting.pop(route, None)
