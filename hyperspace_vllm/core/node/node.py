"""A node: one core that takes every event and returns every effect.

It composes three parts. The prefix part and the lookups of responses live as long as the node. The network part
begins with NetworkJoined, because libp2p takes seconds to start and only then knows this node's address, and ends with
NetworkLeft. What passes between them is decided here: hints at rows, and the peers that may be asked for KV.
"""

import random

from nacl.signing import SigningKey

from ..events.conduct import AnswerAudited
from ..events.known_peers import KvPeersChanged
from ..events.node_state import NetworkJoined, NetworkLeft, Tick
from ..events.vocabulary import Effect, Event, NetworkEvent
from ..peers.dials import Dials
from ..peers.trust import Trust
from ..prefix.prefix_part import PrefixPart
from ..records.ids import PeerId, RowId, peer_id
from ..records.now import Now
from ..response.evidence import verdict
from ..response.open_lookups import LookupEvent, OpenLookups
from .network_part import NetworkPart
from .node_options import NodeOptions


class Node:
    """Everything that a node decides. It draws no randomness but from `rng`.

    `network` is None before NetworkJoined and after NetworkLeft: events of the network then cause nothing.
    """

    def __init__(
        self, options: NodeOptions, signing_key: SigningKey, trust: Trust, dials: Dials, rng: random.Random
    ) -> None:
        self._options = options
        self._key = signing_key
        self._me = peer_id(signing_key.verify_key.encode())
        self._trust = trust
        self._dials = dials
        self._rng = rng
        self.prefixes = PrefixPart(
            options.network, options.kv_peers, options.fetch, rng, trust.standings, self._row_hints, trust.has_standing
        )
        self.responses = OpenLookups(trust.standings, "no_peers" if options.joins else "off")
        self.network: NetworkPart | None = None

    def handle(self, event: Event, now: Now) -> list[Effect]:
        """What to do about `event`."""
        match event:
            case NetworkJoined():
                assert self.network is None
                self.network = NetworkPart(
                    self._options, event, self.responses, self._key, self._trust, self._dials, self._rng, now
                )
                return self._told([*self.network.start(now)])
            case NetworkLeft():
                self.network = self.responses.peers = None
                return self._told([KvPeersChanged((), ())])
            case Tick():
                effects: list[Effect] = [*self.prefixes.handle(event, now)]
                return effects + (
                    self._told([*self.network.handle(event, now)]) if self.network else [*self.responses.on_tick(now)]
                )
            case AnswerAudited() if self.network is None or not self._options.shares:
                evidence = event.evidence
                self._trust.audited(evidence.signer, evidence.tokens, verdict(evidence.far), event.source, now)
                return []
        if isinstance(event, NetworkEvent) and self.network is not None:
            return self._told([*self.network.handle(event, now)])
        if isinstance(event, LookupEvent):
            return [*self.responses.handle(event, now)]
        if isinstance(event, NetworkEvent):
            return []
        return [*self.prefixes.handle(event, now)]

    def next_deadline_ms(self) -> int | None:
        """When to call `handle(Tick())`, if nothing else happens before; None: never."""
        times = [self.prefixes.next_deadline_ms(), self.responses.next_deadline_ms()]
        times += [self.network.next_deadline_ms()] if self.network else []
        return min((time for time in times if time is not None), default=None)

    def may_dial(self, peer: PeerId, address: str, told_from: str, now: Now) -> bool:
        """Whether to dial a peer where an answer of the DHT says that it is; saying yes counts as a dial."""
        return self.network is not None and self.network.members.may_dial_at(peer, address, told_from, now)

    def _told(self, effects: list[Effect]) -> list[Effect]:
        """Effects of the network part, when the prefix part has been told of the peers that it may ask."""
        for effect in effects:
            if isinstance(effect, KvPeersChanged):
                asked = (*self._options.kv_peers, *(endpoint.peer for endpoint in effect.endpoints))
                self.prefixes.set_peers(tuple(peer for peer in dict.fromkeys(asked) if peer != self._me))
        return effects

    def _row_hints(self, row: RowId, now: Now) -> tuple[PeerId, ...]:
        return self.network.providers.of(row, now) if self.network else ()
