"""Membership: the peers that a node knows by their PeerRecords, and which of them are alive.

Choice: a node keeps a few connections (neighbours.py) and knows many more peers by their records, which neighbours
exchange (PEX); it dials others when it needs them. Rejected: a connection to every peer, whose heartbeats alone would
cost a core at 100 nodes; py-libp2p's own peer exchange, which does nothing (docs/notes/py-libp2p.md).
Cost: fetching from a peer that is not connected pays for a handshake.

A neighbour that has been silent for HEARTBEAT_MS is pinged. After one ping without an answer it is neither used nor
recommended until it is heard again; a peer that freezes is noticed within HEARTBEAT_MS + a tick + PING_MS.
"""

import random
from collections.abc import Callable, Iterable, Iterator

from ..events.conduct import ChargePeer
from ..events.connections import Disconnect
from ..events.known_peers import KvEndpoint
from ..events.peer_requests import Send
from ..events.vocabulary import NetworkEffect
from ..records.errors import ProtocolViolation, Refused
from ..records.ids import NetworkId, PeerId, peer_id, public_key_of
from ..records.now import Now
from ..records.peer_record import PeerRecord, check_peer_record, decode_peer_record
from ..records.peer_wire import Greet, PeerRequest, Peers, Ping, WantPeers
from ..records.rank import Acquaintance, Rank
from ..records.reason import Reason
from .address import may_dial, source_of
from .dials import Dials
from .neighbours import CONNECT_MS, Neighbours
from .own_record import OwnRecord
from .peer_exchange import answer_peers, next_to_ask, want_peers
from .peer_table import Peer, PeerTable
from .trust import Trust

HEARTBEAT_MS = 1_000
PING_MS = 1_500
SILENT_DISCONNECT_MS = 20_000
GREET_MS = 3_000
GREET_BY_MS = 2 * GREET_MS  # a connection without a record is closed
EXCHANGE_MS = 2_000  # with each neighbour in turn: a neighbour passes on only peers that it has met
EXCHANGE_SOON_MS = 1_000  # while the last exchange brought something new
EXPLORE_MS = 10_000
SHUN_MS = 60_000

Ask = Callable[[PeerId, PeerRequest, int, Now], list[Send]]


class Membership:
    """`ask` makes a Send and remembers it, unless that question is open; `own` signs a record (sequence, expiry)."""

    def __init__(
        self,
        network: NetworkId,
        me: PeerId,
        own: Callable[[int, int], PeerRecord],
        bootstrap: tuple[tuple[PeerId, str], ...],
        trust: Trust,
        ask: Ask,
        members_only: bool,
        dials: Dials,
        rng: random.Random,
        now: Now,
    ) -> None:
        self._network = network
        self._me = me
        self._trust = trust
        self._ask = ask
        self._members_only = members_only
        self._rng = rng
        self._peers = PeerTable()
        self._own = OwnRecord(network, own, now)
        self._neighbours = Neighbours(self._peers, self._own, trust, dials, rng)
        self._exchange_at_ms = now.mono_ms + EXCHANGE_SOON_MS
        self._explore_at_ms = now.mono_ms + EXPLORE_MS
        self._beat_at_ms = now.mono_ms + HEARTBEAT_MS
        self.changed = False  # `usable` may differ from what it was
        self.has_new = False  # `authors` has one more
        for peer, address in bootstrap:
            if peer != me:
                self._peers.add(Peer(peer, configured=address))

    def remember(self, peers: Iterable[tuple[PeerId, str]]) -> None:
        """Addresses from an earlier run: dialled like any other, forgotten when the peer is not there any more."""
        for peer, address in peers:
            if peer != self._me and self._peers.get(peer) is None:
                self._peers.add(Peer(peer, advertised=address))

    @property
    def own(self) -> PeerRecord:
        """This node's record."""
        return self._own.record

    @property
    def own_raw(self) -> bytes:
        """This node's encoded record."""
        return self._own.raw

    def renew_soon(self) -> None:
        """The contents of this node's record have changed: renew it, a little later if it was renewed just now."""
        self._own.renew_soon()

    def start(self, now: Now) -> list[NetworkEffect]:
        """Dial the bootstrap list."""
        return self._neighbours.dial(now)

    def get(self, peer: PeerId) -> Peer | None:
        """What is known of a peer."""
        return self._peers.get(peer)

    def greeted(self, peer: PeerId) -> bool:
        """Whether the peer has shown its record."""
        known = self._peers.get(peer)
        return known is not None and known.record is not None

    def acquaintance(self, public_key: bytes) -> Acquaintance | None:
        """How well a peer is known; None: its record is not here, and it is not on this node's lists."""
        known = self._peers.get(peer_id(public_key))
        if known is not None and known.record is not None:
            return known.acquaintance
        return Acquaintance(Rank.LISTED, "") if self._trust.is_listed(public_key) else None

    def endpoints(self, now: Now) -> tuple[KvEndpoint, ...]:
        """The KV endpoints of usable peers, as far as this node may dial them."""
        return tuple(
            KvEndpoint(known.peer, known.endpoint, known.owns(known.endpoint))
            for known in self._usable(now)
            if known.endpoint
        )

    def addresses(self, now: Now) -> tuple[tuple[PeerId, str], ...]:
        """The addresses of usable peers, as far as this node may dial them."""
        return tuple((known.peer, known.advertised) for known in self._usable(now) if known.advertised)

    def authors(self) -> tuple[tuple[PeerId, Acquaintance], ...]:
        """Every peer that is known, and how well."""
        here = {known.peer: known.acquaintance for known in self._peers if known.record is not None}
        listed = {peer_id(public_key): Acquaintance(Rank.LISTED, "") for public_key in sorted(self._trust.listed)}
        return tuple({**listed, **here}.items())

    def usable(self, now: Now) -> tuple[PeerRecord, ...]:
        """Valid records of peers that are not silent, in the order in which they were met."""
        return tuple(known.record for known in self._usable(now) if known.record is not None)

    def any_usable(self, now: Now) -> bool:
        """Whether there is a usable peer."""
        return next(self._usable(now), None) is not None

    def neighbours(self) -> list[Peer]:
        """Connected peers that have greeted and are not silent."""
        return [known for known in self._peers if known.connected and known.record and not known.silent]

    def any_neighbour(self) -> Peer | None:
        """A random neighbour, of a random host: one host may have most of the neighbours."""
        neighbours = self.neighbours()
        if not neighbours:
            return None
        host = self._rng.choice(list(dict.fromkeys(known.source for known in neighbours)))
        return self._rng.choice([known for known in neighbours if known.source == host])

    # --- connections ----------------------------------------------------------------------------

    def on_connected(self, peer: PeerId, host: str, now: Now) -> list[NetworkEffect]:
        """Greet the peer, which is met at `host`."""
        known = self._peers.get(peer)
        if known is None:
            known = self._new(peer, source_of(host))
            known.connected = True  # so that it stays
            if peer == self._me or not self._peers.add(known):
                return [Disconnect(peer)]
            known.connected = False
        known.meet(host)
        if not known.connected:
            known.outbound, known.connected_at_ms = known.dialling, now.mono_ms
        known.connected, known.dialling, known.dismissed = True, False, False
        self._heard(known, now)
        return [*self._greet(known, now), *self._neighbours.make_room(known)]

    def on_discovered(self, peer: PeerId, address: str, told_from: str, now: Now) -> list[NetworkEffect]:
        """mDNS reports a peer from the IP address `told_from`: dial it when its turn comes."""
        known = self._peers.get(peer)
        if peer != self._me and known is None and may_dial(address, self._own.record.address, told_from):
            known = self._new(peer, "mdns")
            known.advertised = address
            self._peers.add(known)
        return self._neighbours.dial(now)

    def on_disconnected(self, peer: PeerId, now: Now) -> list[NetworkEffect]:
        """Dial the peer again after a while, and another one now."""
        known = self._peers.get(peer)
        if known is None:
            return []
        self._neighbours.disconnected(known, now)
        if known.record is None and not known.bootstrap:
            self._peers.remove(peer)
        return self._neighbours.dial(now)

    def on_connect_failed(self, peer: PeerId, now: Now) -> list[NetworkEffect]:
        """Dial the peer later, and another one now."""
        known = self._peers.get(peer)
        if known is None or known.connected:
            return []
        self._dial_failed(known, now)
        if known.record is None and not known.bootstrap:
            self._peers.remove(peer)
        return self._neighbours.dial(now)

    def may_dial(self, known: Peer, now: Now) -> bool:
        """Whether to dial the peer at its address now; if so, it is counted."""
        return self._neighbours.may_dial(known, now)

    def may_dial_at(self, peer: PeerId, address: str, told_from: str, now: Now) -> bool:
        """Whether to dial a peer at the address that a DHT answer from `told_from` names; if so, it is counted."""
        return self._neighbours.may_dial_at(peer, address, told_from, now)

    # --- messages -------------------------------------------------------------------------------

    def heard(self, peer: PeerId, now: Now, rtt_ms: int | None = None) -> None:
        """A message came from the peer; `rtt_ms` if it was an answer."""
        known = self._peers.get(peer)
        if known is not None:
            self._heard(known, now)
            if rtt_ms is not None:
                known.rtt_ms = rtt_ms if not known.rtt_ms else 0.8 * known.rtt_ms + 0.2 * rtt_ms

    def is_alive(self, peer: PeerId, now: Now) -> None:
        """Another peer relayed something recent of this peer's: if a dial failed before, the next one may succeed."""
        known = self._peers.get(peer)
        if known is None:
            return
        known.alive_at_ms = now.mono_ms
        if known.silent and not known.connected:
            known.silent = False
            self.changed = True

    def used(self, peer: PeerId, now: Now) -> None:
        """The connection to the peer serves a purpose."""
        known = self._peers.get(peer)
        if known is not None:
            known.used_at_ms = now.mono_ms

    def unanswered(self, peer: PeerId, message: PeerRequest, now: Now) -> None:
        """The peer left a request of ours without an answer."""
        known = self._peers.get(peer)
        if known is not None and known.connected and not known.dismissed and isinstance(message, Ping | Greet):
            known.pinged_at_ms = None
            self._set_silent(known, now)

    def unread(self, peer: PeerId) -> None:
        """This node was too busy to read the peer's answer, which may have come: the peer does not count as silent."""
        known = self._peers.get(peer)
        if known is not None:
            known.pinged_at_ms = None

    def shun(self, peer: PeerId, now: Now) -> list[NetworkEffect]:
        """The peer keeps breaking rules: disconnect, and do not dial it for a while."""
        known = self._peers.get(peer)
        if known is None:
            return []
        known.dial_at_ms = now.mono_ms + SHUN_MS
        return [Disconnect(peer)] if known.connected else []

    def on_record(self, raw: bytes, peer: PeerId, now: Now, own_word: bool) -> list[NetworkEffect]:
        """A record from `peer`; `own_word`: it must be the peer's own (a greeting), not one that it passes on."""
        try:
            record = decode_peer_record(raw)
            if own_word and record.peer != peer:
                raise ProtocolViolation("peer record: expected the sender's own")
            if record.peer == self._me:
                self._own.outbid(record, now)
            elif self._is_newer(record):
                check_peer_record(record, self._network, now.wall_ms)
                known = self._accept(record, raw, None if own_word else peer, now)
                return self._neighbours.make_room(known) if own_word and known is not None else []
            elif (known := self._peers.get(record.peer)) is not None and known.raw == raw:
                self._move_to_smaller_source(known, peer)
        except ProtocolViolation:
            return [ChargePeer(peer, Reason.PROTOCOL)]
        except Refused as refused:
            # Clocks differ, and the relay has checked the record by its own clock; but it cannot forge a record.
            reason = Reason.of(refused)
            return [ChargePeer(peer, reason)] if reason.is_lie else []
        return []

    def on_greeted(self, peer: PeerId, now: Now) -> list[NetworkEffect]:
        """A neighbour's record has come: it may know others."""
        known = self._peers.get(peer)
        return [*self._want_peers(known, now)] if known is not None else []

    def answer_peers(self, want: WantPeers, now: Now) -> Peers:
        """Some records that the asker lacks."""
        return answer_peers(want, self._usable(now), self._rng)

    def on_peers(self, peer: PeerId, answer: Peers, now: Now) -> list[NetworkEffect]:
        """Take in what a neighbour knows."""
        before = {known.peer for known in self._peers}
        for raw in answer.records:
            charge = self.on_record(raw, peer, now, own_word=False)
            if charge:
                return charge
        if any(known.peer not in before for known in self._peers):
            self._exchange_at_ms = min(self._exchange_at_ms, now.mono_ms + EXCHANGE_SOON_MS)
        return self._neighbours.dial(now)

    # --- time -----------------------------------------------------------------------------------

    def next_deadline_ms(self) -> int:
        """When `on_tick` has something to do."""
        return min(self._beat_at_ms, self._exchange_at_ms, self._explore_at_ms, self._own.renew_at_ms)

    def on_tick(self, now: Now) -> list[NetworkEffect]:
        """Heartbeats, dials, exchange, renewal."""
        effects: list[NetworkEffect] = []
        if self._own.must_renew(now):
            self._own.renew(now)
            for each in self.neighbours():
                effects += self._ask(each.peer, Greet(self._own.raw), GREET_MS, now)
        if now.mono_ms >= self._beat_at_ms:
            self._beat_at_ms = now.mono_ms + HEARTBEAT_MS
            effects += self._beat(now) + self._neighbours.trim(now) + self._neighbours.dial(now)
        if now.mono_ms >= self._explore_at_ms:
            self._explore_at_ms = now.mono_ms + EXPLORE_MS
            effects += self._neighbours.explore(now)
        if now.mono_ms >= self._exchange_at_ms:
            self._exchange_at_ms = now.mono_ms + EXCHANGE_MS
            neighbours = self.neighbours()
            if neighbours:
                effects += self._want_peers(next_to_ask(neighbours), now)
        return effects

    def _beat(self, now: Now) -> list[NetworkEffect]:
        effects: list[NetworkEffect] = []
        for known in self._peers:
            if known.record is not None and known.record.expires_at_ms <= now.wall_ms:
                effects += self._expire(known, now)
            if known.connected:
                effects += self._check_connected(known, now)
            elif known.dialling and now.mono_ms - known.dialled_at_ms > 2 * CONNECT_MS:
                self._dial_failed(known, now)  # perhaps a connection was there already
        return effects

    def _expire(self, known: Peer, now: Now) -> list[NetworkEffect]:
        known.record, known.raw, known.advertised, known.endpoint = None, b"", "", ""
        self.changed = True
        if known.connected:
            return [*self._greet(known, now)]  # its own greeting was lost, or the clock was set
        if not (known.dialling or known.bootstrap):
            self._peers.remove(known.peer)
        return []

    def _check_connected(self, known: Peer, now: Now) -> list[NetworkEffect]:
        if known.record is None and now.mono_ms - known.asked_at_ms > GREET_BY_MS:
            return [Disconnect(known.peer)]
        if known.silent and now.mono_ms - known.silent_at_ms > SILENT_DISCONNECT_MS:
            return [Disconnect(known.peer)]
        if known.pinged_at_ms is not None:
            if now.mono_ms - known.pinged_at_ms < PING_MS:
                return []
            self._set_silent(known, now)
        if now.mono_ms - known.heard_at_ms < HEARTBEAT_MS:
            return []
        known.pinged_at_ms = now.mono_ms
        return [*self._ask(known.peer, Ping(), PING_MS, now)]

    def _dial_failed(self, known: Peer, now: Now) -> None:
        self._neighbours.dial_failed(known, now)
        self._set_silent(known, now)

    def _greet(self, known: Peer, now: Now) -> list[Send]:
        known.asked_at_ms = now.mono_ms
        return self._ask(known.peer, Greet(self._own.raw), GREET_MS, now)

    # --- leaves ---------------------------------------------------------------------------------

    def _usable(self, now: Now) -> Iterator[Peer]:
        for known in self._peers:
            if known.record is not None and known.record.expires_at_ms > now.wall_ms and not known.silent:
                yield known

    def _new(self, peer: PeerId, source: str) -> Peer:
        return Peer(peer, listed=self._trust.is_listed(public_key_of(peer)), source=source)

    def _source_told_by(self, peer: PeerId | None) -> str:
        teller = self._peers.get(peer) if peer is not None else None
        return teller.source if teller is not None and teller.source else str(peer)

    def _move_to_smaller_source(self, known: Peer, told_by: PeerId) -> None:
        """Count a peer that was never met as brought by the smallest source that reports it: one may be hostile."""
        source = self._source_told_by(told_by)
        if known.met or source == known.source:
            return
        if self._peers.of_source(source) + 1 < self._peers.of_source(known.source):
            known.source, self.changed = source, True

    def _accept(self, record: PeerRecord, raw: bytes, told_by: PeerId | None, now: Now) -> Peer | None:
        is_member = self._trust.meet(record.public_key, record.member_tag)
        if self._members_only and not is_member:
            raise Refused("stranger")
        known = self._peers.get(record.peer)
        if known is None:
            known = self._new(record.peer, self._source_told_by(told_by))
            if not self._peers.add(known):
                return None
        elif told_by is not None:
            self._move_to_smaller_source(known, told_by)
        moved = known.record is not None and known.record.address != record.address
        self.has_new = self.has_new or known.record is None
        known.record, known.raw, known.member = record, raw, is_member
        teller = known if told_by is None else self._peers.get(told_by)
        told_from = teller.hosts[0] if teller is not None and teller.hosts else ""
        known.advertised = record.address if may_dial(record.address, self._own.record.address, told_from) else ""
        known.endpoint = record.endpoint if may_dial(record.endpoint, self._own.record.address, told_from) else ""
        if moved and not known.connected:
            known.failures, known.dial_at_ms = 0, now.mono_ms
        self.changed = True
        self.is_alive(record.peer, now)
        return known

    def _is_newer(self, record: PeerRecord) -> bool:
        known = self._peers.get(record.peer)
        return known is None or known.record is None or known.record.sequence < record.sequence

    def _heard(self, known: Peer, now: Now) -> None:
        known.heard_at_ms = known.alive_at_ms = now.mono_ms
        known.pinged_at_ms = None
        if known.silent:
            known.silent = False
            self.changed = True

    def _set_silent(self, known: Peer, now: Now) -> None:
        if not known.silent:
            known.silent, known.silent_at_ms = True, now.mono_ms
            self.changed = True

    def _want_peers(self, neighbour: Peer, now: Now) -> list[Send]:
        neighbour.exchanged_at_ms = now.mono_ms
        known = (each.record for each in self._peers if each.record is not None)
        return self._ask(neighbour.peer, want_peers(known, self._own.record), GREET_MS, now)
