"""What peers ask of this node, and what they answer to its own questions."""

from ..events.conduct import ChargePeer
from ..events.connections import Disconnect
from ..events.peer_requests import Answered, Reply, RequestFailed, RequestReceived, ServeResponse
from ..events.vocabulary import NetworkEffect
from ..peers.membership import GREET_MS, Membership
from ..peers.trust import Trust
from ..records.ids import PeerId, public_key_of
from ..records.now import Now
from ..records.peer_wire import (
    Deltas,
    Greet,
    Greeting,
    Peers,
    Ping,
    Pong,
    Query,
    Refusal,
    WantDeltas,
    WantPeers,
)
from ..records.reason import Reason
from ..registry.registry import Registry
from ..registry.registry_sync import RegistrySync
from ..response.popularity import Popularity
from .own_requests import Asked, Forgotten, OwnRequests


class PeerMessages:
    """Hands each message to the machine that it concerns; a peer that has not greeted is told nothing."""

    def __init__(
        self,
        requests: OwnRequests,
        members: Membership,
        registry: Registry,
        sync: RegistrySync,
        popularity: Popularity,
        trust: Trust,
    ) -> None:
        self._requests = requests
        self._members = members
        self._registry = registry
        self._sync = sync
        self._popularity = popularity
        self._trust = trust

    def heard(self, peer: PeerId, now: Now, rtt_ms: int | None = None) -> None:
        """Anything came from the peer; `rtt_ms` if it was an answer."""
        known = self._members.get(peer)
        if known is not None and known.silent:
            self._trust.standings.spoke(peer)
        self._members.heard(peer, now, rtt_ms)

    def on_request(self, event: RequestReceived, now: Now) -> list[NetworkEffect]:
        """Answer a peer's request."""
        peer, token, message = event.peer, event.token, event.message
        self.heard(peer, now)
        if isinstance(message, Query):
            self._members.used(peer, now)
            if self._trust.is_chosen(public_key_of(peer)):  # a stranger may ask for anything, as often as it likes
                self._popularity.add(message.id, now)
            return [ServeResponse(token, message.id, self._popularity.sixteenths(message.id, now))]
        if isinstance(message, Greet):
            charges = self._members.on_record(message.record, peer, now, own_word=True)
            if charges or not self._members.greeted(peer):
                reason = Refusal("protocol" if charges else "stranger")
                return [*charges, Reply(token, reason), Disconnect(peer)]
            return [Reply(token, Greeting(self._members.own_raw))]
        if isinstance(message, Ping):
            return [Reply(token, Pong())]
        if not self._members.greeted(peer):
            return [Reply(token, Refusal("stranger"))]
        if isinstance(message, WantPeers):
            return [Reply(token, self._members.answer_peers(message, now))]
        return [Reply(token, self._registry.answer(message, now))]

    def on_answer(self, event: Answered, now: Now) -> list[NetworkEffect]:
        """A peer's answer to a question of this node."""
        asked = self._requests.take(event.request)
        if asked is None or asked.peer != event.peer:
            return []
        self.heard(event.peer, now, now.mono_ms - asked.at_ms)
        match asked.message, event.message:
            case Greet(), Greeting(record):
                charges = self._members.on_record(record, event.peer, now, own_word=True)
                if not self._members.greeted(event.peer):
                    return [*charges, Disconnect(event.peer)]
                self._requests.greeted(event.peer)
                return [*charges, *self._members.on_greeted(event.peer, now), *self._sync.with_peer(event.peer, now)]
            case WantPeers(), Peers():
                return self._members.on_peers(event.peer, event.message, now)
            case WantDeltas(), Deltas():
                return [*self._registry.on_deltas(event.peer, event.message, now), *self._sync.go_on(now)]
            case Ping(), Pong():
                return []
            case WantPeers() | WantDeltas(), Refusal("stranger"):
                return self._forgotten(asked, now)
            case _, Refusal():
                return []
            case _:
                return [ChargePeer(event.peer, Reason.PROTOCOL)]

    def on_failed(self, event: RequestFailed, now: Now) -> list[NetworkEffect]:
        """A question of this node has no good answer."""
        asked = self._requests.take(event.request)
        if asked is None:
            return []
        if event.reason is Reason.PROTOCOL:
            return [ChargePeer(asked.peer, Reason.PROTOCOL)]
        if event.reason is Reason.BUSY:
            self._members.unread(asked.peer)
        else:
            self._members.unanswered(asked.peer, asked.message, now)
        return []

    def _forgotten(self, asked: Asked, now: Now) -> list[NetworkEffect]:
        match self._requests.forgotten(asked, now):
            case Forgotten.GREET:
                return [*self._requests.ask(asked.peer, Greet(self._members.own_raw), GREET_MS, now)]
            case Forgotten.CHARGE:
                return [ChargePeer(asked.peer, Reason.PROTOCOL)]
            case Forgotten.WAIT:
                return []
