"""Who is there: PeerRecords by greeting and peer exchange, a few neighbours kept connected, heartbeats.

Choice: a node keeps TARGET_NEIGHBOURS connections and knows many more peers by their records, which neighbours
exchange (PEX); others are dialled when they are needed. Rejected: a connection to everybody, whose heartbeats alone
would cost a core at 100 nodes; py-libp2p's own peer exchange, which does nothing (DESIGN §9). Cost: fetching from a
stranger pays for a handshake.

A neighbour that has been silent for HEARTBEAT_MS is pinged. One ping without answer and it is not used (and not
recommended) any more, until it is heard again; a peer that freezes is noticed within HEARTBEAT_MS + a tick + PING_MS.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..node.network_effects import ChargePeer, Connect, Disconnect, NetworkEffect, Send
from ..records.errors import ProtocolViolation, Refused
from ..records.ids import NetworkId, PeerId
from ..records.limits import PEER_RECORD_TTL_MS, PEERS_KNOWN_MAX, PEX_RECORDS_MAX
from ..records.peer_record import PeerRecord, check_peer_record, decode_peer_record
from ..records.peer_wire import KNOWN_BYTES, Greet, PeerRequest, Peers, Ping, WantPeers

TARGET_NEIGHBOURS = 8
HEARTBEAT_MS = 1_000
PING_MS = 1_500
SILENT_DISCONNECT_MS = 20_000
CONNECT_MS = 3_000
GREET_MS = 3_000
RENEW_MS = PEER_RECORD_TTL_MS // 5
EXCHANGE_MS = 5_000
EXCHANGE_SOON_MS = 1_000  # while the last exchange brought something new
DIAL_AGAIN_MS = 2_000  # doubled for every failure
DIAL_AGAIN_MS_MAX = 60_000
BOOTSTRAP_AGAIN_MS_MAX = 10_000
DIALS_MAX = 4  # at once

Ask = Callable[[PeerId, PeerRequest, int], Send]
Meet = Callable[[bytes, bytes], bool]


@dataclass(slots=True)
class Peer:
    """What is known of one other node."""

    peer: PeerId
    address: str
    record: PeerRecord | None = None
    raw: bytes = b""
    bootstrap: bool = False
    connected: bool = False
    dialling: bool = False
    silent: bool = False  # it left a ping unanswered
    heard_at_ms: int = 0
    pinged: bool = False
    dial_at_ms: int = 0
    failures: int = 0
    rtt_ms: float = 0.0


class Membership:
    """`ask` makes a Send and remembers it; `meet` is Trust.meet; `own` signs this node's record (sequence, expiry)."""

    def __init__(
        self,
        network: NetworkId,
        me: PeerId,
        own: Callable[[int, int], PeerRecord],
        bootstrap: tuple[tuple[PeerId, str], ...],
        meet: Meet,
        ask: Ask,
        members_only: bool,
        rng: random.Random,
        now_ms: int,
    ) -> None:
        self._network = network
        self._me = me
        self._sign_own = own
        self._meet = meet
        self._ask = ask
        self._members_only = members_only
        self._rng = rng
        self._peers: dict[PeerId, Peer] = {}
        self._sequence = now_ms  # greater than in an earlier life
        self._renew(now_ms)
        self._exchange_at_ms = now_ms + EXCHANGE_SOON_MS
        self._beat_at_ms = now_ms + HEARTBEAT_MS
        self.changed = True  # since somebody last asked for `usable`
        for peer, address in bootstrap:
            if peer != me:
                self._peers[peer] = Peer(peer, address, bootstrap=True)

    @property
    def own_raw(self) -> bytes:
        """This node's encoded record."""
        return self._own_raw

    def start(self, now_ms: int) -> list[NetworkEffect]:
        """Dial the bootstrap list."""
        return self._dial(now_ms)

    def get(self, peer: PeerId) -> Peer | None:
        """What is known of a peer."""
        return self._peers.get(peer)

    def greeted(self, peer: PeerId) -> bool:
        """Whether the peer has shown its record."""
        known = self._peers.get(peer)
        return known is not None and known.record is not None

    def usable(self, now_ms: int) -> tuple[Peer, ...]:
        """Peers with a valid record that don't keep silent, in the order in which they were met."""
        return tuple(
            known
            for known in self._peers.values()
            if known.record is not None and known.record.expires_at_ms > now_ms and not known.silent
        )

    def neighbours(self) -> list[Peer]:
        """Connected peers that have greeted and don't keep silent."""
        return [known for known in self._peers.values() if known.connected and known.record and not known.silent]

    # --- connections ----------------------------------------------------------------------------

    def on_connected(self, peer: PeerId, now_ms: int) -> list[NetworkEffect]:
        """Greet it."""
        known = self._peers.get(peer)
        if known is None:
            known = self._add(Peer(peer, ""), now_ms)
            if known is None:
                return [Disconnect(peer)]
        known.connected, known.dialling, known.failures = True, False, 0
        self._heard(known, now_ms)
        return [self._ask(peer, Greet(self._own_raw), GREET_MS)]

    def on_disconnected(self, peer: PeerId, now_ms: int) -> list[NetworkEffect]:
        """Dial again after a while, or somebody else."""
        known = self._peers.get(peer)
        if known is None:
            return []
        known.connected = known.dialling = known.pinged = False
        known.dial_at_ms = now_ms + DIAL_AGAIN_MS
        if known.record is None and not known.bootstrap:
            del self._peers[peer]
        return self._dial(now_ms)

    def on_connect_failed(self, peer: PeerId, now_ms: int) -> list[NetworkEffect]:
        """Not now; try others."""
        known = self._peers.get(peer)
        if known is None or known.connected:
            return []
        known.dialling = False
        known.failures += 1
        longest = BOOTSTRAP_AGAIN_MS_MAX if known.bootstrap else DIAL_AGAIN_MS_MAX
        known.dial_at_ms = now_ms + min(DIAL_AGAIN_MS << min(known.failures, 10), longest)
        self._set_silent(known)
        return self._dial(now_ms)

    # --- messages -------------------------------------------------------------------------------

    def heard(self, peer: PeerId, now_ms: int, rtt_ms: int | None = None) -> None:
        """Anything came from the peer; `rtt_ms` if it was an answer."""
        known = self._peers.get(peer)
        if known is not None:
            self._heard(known, now_ms)
            if rtt_ms is not None:
                known.rtt_ms = rtt_ms if not known.rtt_ms else 0.8 * known.rtt_ms + 0.2 * rtt_ms

    def unanswered(self, peer: PeerId, message: PeerRequest, now_ms: int) -> list[NetworkEffect]:
        """A request of ours failed; a ping of a silent neighbour goes on until it is given up."""
        known = self._peers.get(peer)
        if known is None:
            return []
        known.pinged = False
        if isinstance(message, Ping | Greet):
            self._set_silent(known)
        if known.connected and known.silent and now_ms - known.heard_at_ms > SILENT_DISCONNECT_MS:
            known.dial_at_ms = now_ms + DIAL_AGAIN_MS_MAX
            return [Disconnect(peer)]
        return []

    def on_record(self, raw: bytes, peer: PeerId, now_ms: int, own_word: bool) -> list[NetworkEffect]:
        """A record from `peer`; `own_word`: it must be the peer's own (a greeting), as against one passed on."""
        try:
            record = decode_peer_record(raw)
            if own_word and record.peer != peer:
                raise ProtocolViolation("peer record: expected the sender's own")
            if record.peer != self._me and self._is_newer(record):
                check_peer_record(record, self._network, now_ms)
                self._accept(record, raw, now_ms)
        except ProtocolViolation:
            return [ChargePeer(peer, "protocol")]
        except Refused as refused:
            # Who passes a record on has checked it; it may have expired since.
            return [] if refused.reason in ("expired", "stranger") else [ChargePeer(peer, refused.reason)]
        return []

    def on_greeted(self, peer: PeerId, now_ms: int) -> list[NetworkEffect]:
        """A neighbour's record has come: it may know others."""
        known = self._peers.get(peer)
        if known is None or known.record is None:
            return [Disconnect(peer)]
        return [self._want_peers(peer)]

    def answer_peers(self, want: WantPeers, now_ms: int) -> Peers:
        """Some records that the asker lacks."""
        size = KNOWN_BYTES
        known = {want.known[at : at + 8]: want.known[at + 8 : at + size] for at in range(0, len(want.known), size)}
        lacking = [
            each.raw
            for each in self.usable(now_ms)
            if each.record is not None
            and known.get(each.record.public_key[:8], b"") < each.record.sequence.to_bytes(8, "big")
        ]
        if len(lacking) > PEX_RECORDS_MAX:
            lacking = self._rng.sample(lacking, PEX_RECORDS_MAX)
        return Peers(tuple(lacking))

    def on_peers(self, peer: PeerId, answer: Peers, now_ms: int) -> list[NetworkEffect]:
        """Take in what a neighbour knows."""
        before = len(self._peers)
        effects = [effect for raw in answer.records for effect in self.on_record(raw, peer, now_ms, own_word=False)]
        if len(self._peers) > before:
            self._exchange_at_ms = min(self._exchange_at_ms, now_ms + EXCHANGE_SOON_MS)
        return effects + self._dial(now_ms)

    # --- time -----------------------------------------------------------------------------------

    def next_deadline_ms(self) -> int:
        """When `on_tick` has something to do."""
        return min(self._beat_at_ms, self._exchange_at_ms, self._renew_at_ms)

    def on_tick(self, now_ms: int) -> list[NetworkEffect]:
        """Heartbeats, dials, exchange, renewal."""
        effects: list[NetworkEffect] = []
        if now_ms >= self._renew_at_ms:
            self._renew(now_ms)
            effects += [self._ask(each.peer, Greet(self._own_raw), GREET_MS) for each in self.neighbours()]
        if now_ms >= self._beat_at_ms:
            self._beat_at_ms = now_ms + HEARTBEAT_MS
            effects += self._beat(now_ms)
        if now_ms >= self._exchange_at_ms:
            self._exchange_at_ms = now_ms + EXCHANGE_MS
            neighbours = self.neighbours()
            if neighbours:
                effects.append(self._want_peers(self._rng.choice(neighbours).peer))
        return effects

    # --- leaves ---------------------------------------------------------------------------------

    def _beat(self, now_ms: int) -> list[NetworkEffect]:
        effects: list[NetworkEffect] = []
        for known in list(self._peers.values()):
            if known.connected and not known.pinged and now_ms - known.heard_at_ms >= HEARTBEAT_MS:
                known.pinged = True
                effects.append(self._ask(known.peer, Ping(), PING_MS))
            if known.record is not None and known.record.expires_at_ms <= now_ms:
                known.record, known.raw = None, b""
                self.changed = True
                if not known.connected and not known.bootstrap:
                    del self._peers[known.peer]
        return effects + self._dial(now_ms)

    def _dial(self, now_ms: int) -> list[NetworkEffect]:
        """Connect to as many more as are wanted; the bootstrap list first."""
        connected = sum(known.connected and not known.silent for known in self._peers.values())
        dialling = sum(known.dialling for known in self._peers.values())
        wanted = min(TARGET_NEIGHBOURS - connected - dialling, DIALS_MAX - dialling)
        if wanted <= 0:
            return []
        ready = [
            known
            for known in self._peers.values()
            if known.address and not known.connected and not known.dialling and known.dial_at_ms <= now_ms
        ]
        self._rng.shuffle(ready)
        ready.sort(key=lambda known: (not known.bootstrap, known.failures))
        for known in ready[:wanted]:
            known.dialling = True
        return [Connect(known.peer, known.address, CONNECT_MS) for known in ready[:wanted]]

    def _accept(self, record: PeerRecord, raw: bytes, now_ms: int) -> None:
        is_member = self._meet(record.public_key, record.member_tag)
        if self._members_only and not is_member:
            raise Refused("stranger")
        known = self._peers.get(record.peer) or self._add(Peer(record.peer, record.address), now_ms)
        if known is None:
            return
        before = known.record
        known.record, known.raw = record, raw
        if not known.bootstrap or record.address:
            known.address = record.address
        if before is None or (before.address, before.endpoint) != (record.address, record.endpoint):
            self.changed = True

    def _is_newer(self, record: PeerRecord) -> bool:
        known = self._peers.get(record.peer)
        return known is None or known.record is None or known.record.sequence < record.sequence

    def _add(self, peer: Peer, now_ms: int) -> Peer | None:
        """None when the table is full of peers that are better known."""
        if len(self._peers) >= PEERS_KNOWN_MAX:
            idle = [p for p in self._peers.values() if not (p.connected or p.bootstrap or p.dialling)]
            if not idle:
                return None
            oldest = min(idle, key=lambda p: (p.heard_at_ms, p.record.expires_at_ms if p.record else 0))
            del self._peers[oldest.peer]
        self._peers[peer.peer] = peer
        return peer

    def _heard(self, known: Peer, now_ms: int) -> None:
        known.heard_at_ms = now_ms
        known.pinged = False
        if known.silent:
            known.silent = False
            self.changed = True

    def _set_silent(self, known: Peer) -> None:
        if not known.silent:
            known.silent = True
            self.changed = True

    def _want_peers(self, peer: PeerId) -> Send:
        known = [each.record for each in self._peers.values() if each.record is not None]
        if len(known) > PEERS_KNOWN_MAX:
            known = known[-PEERS_KNOWN_MAX:]
        pieces = [record.public_key[:8] + record.sequence.to_bytes(8, "big") for record in known]
        return self._ask(peer, WantPeers(b"".join(pieces)), GREET_MS)

    def _renew(self, now_ms: int) -> None:
        self._sequence += 1
        self._renew_at_ms = now_ms + RENEW_MS
        self._own_raw = self._sign_own(self._sequence, now_ms + PEER_RECORD_TTL_MS).encode()
