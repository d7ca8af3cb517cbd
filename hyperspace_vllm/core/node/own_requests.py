"""This node's requests to peers, from when they are sent until they are answered or have failed.

Answers can make this node ask again: a greeting is followed by two questions, and a peer that has forgotten this node
is greeted anew. So that no peer gets an endless exchange out of that, one question of a kind is open to a peer at a
time, and a peer is greeted again at most once in GREET_AGAIN_MS. One that was, and still says that it doesn't know this
node, breaks the protocol.
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto

from ..events.peer_requests import Send
from ..records.ids import PeerId
from ..records.limits import PEERS_KNOWN_MAX
from ..records.now import Now
from ..records.peer_wire import Greet, PeerRequest, WantDeltas, WantPeers

REQUESTS_MAX = 4_096
GREET_AGAIN_MS = 10_000


class Forgotten(Enum):
    """What a peer deserves that says that it doesn't know this node."""

    GREET = auto()
    WAIT = auto()  # for the greeting that is under way, or the next one
    CHARGE = auto()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request without an answer so far."""

    request: int
    peer: PeerId
    message: PeerRequest
    at_ms: int
    until_ms: int


@dataclass(slots=True)
class _Again:
    """A peer that was greeted again."""

    at_ms: int
    greeted_at: int | None = None  # the last request before it answered


class OwnRequests:
    """One node's; a request that is still open when there are REQUESTS_MAX later ones is forgotten."""

    def __init__(self) -> None:
        self._last = 0
        self._open: dict[int, Asked] = {}
        self._newest: dict[tuple[PeerId, type[PeerRequest]], Asked] = {}
        self._again: OrderedDict[PeerId, _Again] = OrderedDict()

    def ask(self, peer: PeerId, message: PeerRequest, timeout_ms: int, now: Now) -> list[Send]:
        """Send a request; nothing if it is a question that is open to this peer already."""
        if isinstance(message, WantPeers | WantDeltas) and self._is_open(peer, type(message), now):
            return []
        if len(self._open) >= REQUESTS_MAX:
            self.take(next(iter(self._open)))
        self._last += 1
        asked = Asked(self._last, peer, message, now.mono_ms, now.mono_ms + timeout_ms)
        self._open[self._last] = self._newest[peer, type(message)] = asked
        return [Send(self._last, peer, message, timeout_ms)]

    def take(self, request: int) -> Asked | None:
        """The request, which is answered or has failed; None: it is over or never was."""
        asked = self._open.pop(request, None)
        if asked is not None and self._newest.get((asked.peer, type(asked.message))) is asked:
            del self._newest[asked.peer, type(asked.message)]
        return asked

    def greeted(self, peer: PeerId) -> None:
        """The peer has answered a greeting with its own: from now on it knows this node."""
        again = self._again.get(peer)
        if again is not None and again.greeted_at is None:
            again.greeted_at = self._last

    def forgotten(self, asked: Asked, now: Now) -> Forgotten:
        """The peer has refused `asked` because it doesn't know this node; GREET counts as done."""
        if self._is_open(asked.peer, Greet, now):
            return Forgotten.WAIT
        again = self._again.get(asked.peer)
        if again is None or now.mono_ms - again.at_ms >= GREET_AGAIN_MS:
            self._again[asked.peer] = _Again(now.mono_ms)
            self._again.move_to_end(asked.peer)
            if len(self._again) > PEERS_KNOWN_MAX:
                self._again.popitem(last=False)
            return Forgotten.GREET
        knows = again.greeted_at is not None and asked.request > again.greeted_at
        return Forgotten.CHARGE if knows else Forgotten.WAIT

    def _is_open(self, peer: PeerId, kind: type[PeerRequest], now: Now) -> bool:
        asked = self._newest.get((peer, kind))
        return asked is not None and now.mono_ms < asked.until_ms
