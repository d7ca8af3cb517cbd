"""Slot holders: one attacking host with the network key and many identities, which occupies the places for inbound
connections at the nodes through which all others join.

Each identity connects as soon as a node is up, and again whenever its connection was closed. It greets as a member,
answers as an honest node would, sends a request now and then so that its connection counts as used, and has no data.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from typing import Protocol

from nacl.signing import SigningKey

from ..core.records.ids import peer_id
from ..core.records.limits import PEER_RECORD_TTL_MS
from ..core.records.peer_record import PeerRecord
from ..core.records.peer_wire import (
    Deltas,
    Greet,
    Greeting,
    Miss,
    PeerAnswer,
    PeerRequest,
    Peers,
    Ping,
    Pong,
    Query,
    WantPeers,
    decode_request,
    encode,
)
from ..core.records.signing import member_tag
from .setting import Setting

HOST = "198.51.100.7"
VICTIMS_MAX = 8
DIAL_MS = 2_000
TRY_EVERY_MS = 4_000
ASK_EVERY_MS = 8_000
FRAME_BYTES = 128


class Victim(Protocol):
    """A host whose places are held (SimHost)."""

    @property
    def number(self) -> int: ...
    def asked(self, asker: int, frame: bytes, answer: Callable[[bytes], None]) -> None: ...


class Victims(Protocol):
    """All hosts (Fleet)."""

    @property
    def hosts(self) -> Sequence[Victim]: ...
    @property
    def honest(self) -> Sequence[Victim]: ...


class Holder:
    """Identity `number` of the attacking host; it is no SimHost, and runs no core."""

    def __init__(self, setting: Setting, victims: Victims, number: int, network_key: bytes) -> None:
        self.number = number
        self.address = f"{HOST}:{4001 + number}"
        self.liar = self  # it does not count as honest
        self._setting = setting
        self._network = setting.network
        self._victims = victims
        self._rng = random.Random(f"{setting.seed}/holder/{number}")
        self._key = SigningKey(sha256(b"holder/%d" % number).digest())
        self._public_key = self._key.verify_key.encode()
        self.peer = peer_id(self._public_key)
        self._tag = member_tag(network_key, self._public_key)

    def boot(self) -> None:
        """Begin."""
        self._network.boot(self.number)
        for host in self._victims.honest[:VICTIMS_MAX]:
            self._later(self._rng.uniform(0, TRY_EVERY_MS), partial(self._try, host.number))

    # --- sim.network.Host, and what the other hosts call ------------------------------------------

    def opened(self, peer: int) -> None:
        """A connection is there: greet."""
        wall_ms = self._setting.wall_ms
        record = PeerRecord(
            self._setting.network_id,
            self._public_key,
            wall_ms,
            wall_ms + PEER_RECORD_TTL_MS,
            self.address,
            "",
            self._tag,
        )
        self._record = record.sign(self._key).encode()
        self._ask(peer, Greet(self._record))

    def closed(self, peer: int) -> None:
        """The connection is closed; `_try` notices."""

    def heard_gossip(self, relay: int, topic: str, payload: bytes) -> None:
        """It passes nothing on."""

    def asked(self, asker: int, frame: bytes, answer: Callable[[bytes], None]) -> None:
        """A request comes."""
        answer(encode(self._answer(decode_request(frame))))

    # --- what it does -----------------------------------------------------------------------------

    def _answer(self, message: PeerRequest) -> PeerAnswer:
        match message:
            case Greet():
                return Greeting(self._record)
            case Ping():
                return Pong()
            case WantPeers():
                return Peers(())
            case Query():
                return Miss("unknown")
            case _:
                return Deltas((), ())

    def _try(self, host: int) -> None:
        if not self._network.connected(self.number, host):
            self._network.dial(self.number, host, DIAL_MS, lambda failed: None)
        elif self._rng.uniform(0, ASK_EVERY_MS) < TRY_EVERY_MS:
            self._ask(host, Query(self._rng.randbytes(32)))
        self._later(self._rng.uniform(0.5, 1.5) * TRY_EVERY_MS, partial(self._try, host))

    def _ask(self, host: int, message: PeerRequest) -> None:
        asked = partial(self._victims.hosts[host].asked, self.number, encode(message), lambda answer: None)
        self._network.send(self.number, host, FRAME_BYTES, asked)

    def _later(self, delay_ms: float, act: Callable[[], None]) -> None:
        self._network.on(self.number, delay_ms, act)
