"""A Membership and its clock, with peers that connect, greet and tell of others."""

import random
from dataclasses import dataclass, field, replace

from hyperspace_vllm.core.events.connections import Connect, Disconnect
from hyperspace_vllm.core.events.peer_requests import Send
from hyperspace_vllm.core.events.vocabulary import NetworkEffect
from hyperspace_vllm.core.peers.dials import Dials
from hyperspace_vllm.core.peers.membership import Membership
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import PEER_RECORD_TTL_MS
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.peer_record import PeerRecord
from hyperspace_vllm.core.records.peer_wire import PeerRequest, Ping
from hyperspace_vllm.core.records.signing import member_tag
from tests.support.moments import BOOTED_MS, dated
from tests.support.network_world import NETWORK, NETWORK_KEY, NOW_MS, Identity, only

ME = Identity(0)


@dataclass
class Node:
    """A Membership and its clock."""

    bootstrap: tuple[int, ...] = ()
    network_key: bytes | None = NETWORK_KEY
    now_ms: int = NOW_MS
    set_by_ms: int = 0  # the wall clock, forward or back
    address: str = ME.address
    sent: list[Send] = field(default_factory=list)

    @property
    def now(self) -> Now:
        return replace(dated(self.now_ms), wall_ms=self.now_ms + self.set_by_ms)

    def __post_init__(self) -> None:
        trust = Trust("members", ME.public_key, frozenset(), frozenset(), self.network_key)
        self.trust = trust
        addresses = tuple((Identity(number).peer, Identity(number).address) for number in self.bootstrap)
        self.members = Membership(
            NETWORK,
            ME.peer,
            self._own,
            addresses,
            trust,
            self._ask,
            self.network_key is not None,
            Dials(self.now),
            random.Random(1),
            self.now,
        )

    def _own(self, sequence: int, expires_at_ms: int) -> PeerRecord:
        tag = member_tag(NETWORK_KEY, ME.public_key)
        return PeerRecord(NETWORK, ME.public_key, sequence, expires_at_ms, self.address, member_tag=tag).sign(ME.key)

    def _ask(self, peer: PeerId, message: PeerRequest, timeout_ms: int, now: Now) -> list[Send]:
        self.sent.append(Send(len(self.sent), peer, message, timeout_ms))
        return self.sent[-1:]

    def connect(self, *numbers: int, chosen: bool = False) -> None:
        """Peers connect and greet."""
        for number in numbers:
            who = Identity(number)
            if chosen:
                known = self.members.get(who.peer)
                assert known is not None
                known.dialling = True
            self.members.on_connected(who.peer, who.host, self.now)
            assert self.learn(number, own_word=True) == []

    def learn(self, number: int, own_word: bool = False, told_by: int = 1, **said: object) -> list[NetworkEffect]:
        """A record comes, of the peer itself or through another."""
        who = Identity(number)
        said.setdefault("expires_at_ms", self.now.wall_ms + PEER_RECORD_TTL_MS)
        raw = who.record(**said)  # type: ignore[arg-type]
        return self.members.on_record(raw, who.peer if own_word else Identity(told_by).peer, self.now, own_word)

    def run(self, for_ms: int, answer: bool = True) -> list[NetworkEffect]:
        """Let time pass; `answer`: pings are answered at once, dials fail."""
        effects: list[NetworkEffect] = []
        until_ms = self.now_ms + for_ms
        while (due_ms := self.members.next_deadline_ms() + BOOTED_MS) <= until_ms:
            self.now_ms = max(self.now_ms, due_ms)
            new = self.members.on_tick(self.now)
            assert self.members.next_deadline_ms() > self.now.mono_ms
            effects += new
            for effect in new:
                if answer and isinstance(effect, Send) and isinstance(effect.message, Ping):
                    self.members.heard(effect.peer, self.now, 1)
                elif answer and isinstance(effect, Connect):
                    effects += self.members.on_connect_failed(effect.peer, self.now)
        self.now_ms = until_ms
        return effects

    def usable(self) -> set[PeerId]:
        return {record.peer for record in self.members.usable(self.now)}

    def neighbours(self) -> set[PeerId]:
        return {known.peer for known in self.members.neighbours()}


def peers(*numbers: int) -> set[PeerId]:
    return {Identity(number).peer for number in numbers}


def arrive(node: Node, number: int, host: str) -> list[PeerId]:
    """A peer connects from a host and greets; whose connections close for that."""
    who = Identity(number)
    effects = node.members.on_connected(who.peer, host, node.now)
    effects += node.learn(number, own_word=True)
    closed = [effect.peer for effect in only(effects, Disconnect)]
    for peer in closed:
        node.members.on_disconnected(peer, node.now)
    return closed
