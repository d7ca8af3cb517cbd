"""Hosts that lie. A liar runs the real core, so that other hosts find it, admit it with the network key and connect to
it, and then differs from an honest host in one way. All liars announce the responses that they hear of as their own, so
that they are asked.

Liars know every prompt (the worst case), so their data is sealed correctly. A member that signs a wrong answer of its
own cannot be told from an honest one's mistake (docs/design.md: a signature only proves which key made a statement), so
the forgers' proofs are signed by keys of no member. Strangers do not hold the network key; they sign their own proofs.
An open network admits every node, and trust can be earned there: its attackers are OPEN_KINDS.
"""

import random
from collections.abc import Callable
from hashlib import sha256
from typing import Literal, Protocol, get_args

from nacl.signing import SigningKey

from ..core.events.stored_responses import ResponseStored
from ..core.events.vocabulary import Event
from ..core.records.announcement import (
    RESPONSE_TOPIC,
    Announcement,
    ResponseEntry,
    decode_announcement,
    encode_announcement,
)
from ..core.records.errors import ProtocolViolation
from ..core.records.ids import RequestKey
from ..core.records.limits import (
    CLOCK_SKEW_MS,
    PEER_RECORD_TTL_MS,
    PEX_RECORDS_MAX,
    REGISTRY_TTL_MS,
    RESPONSE_TTL_MS,
    STREAM_FRAME_BYTES_MAX,
)
from ..core.records.peer_record import PeerRecord
from ..core.records.peer_wire import (
    Deltas,
    Greet,
    Hit,
    PeerRequest,
    Peers,
    Ping,
    Query,
    WantDeltas,
    WantPeers,
    encode,
)
from ..core.records.registry_delta import RegistryDelta, encode_delta
from ..core.records.signing import NO_MEMBER_TAG, member_tag
from ..core.response.sealed_hit import make_hit
from .documents import payload_of
from .setting import Setting
from .sim_responses import Response, compute, right_body

Kind = Literal[
    "altered",  # the right proof, another body
    "forged",  # a proof signed by a key of no member
    "replayed",  # another request's hit
    "expired",  # a proof that was good yesterday
    "garbled",  # bytes that are not a message, on streams and in gossip
    "oversized",  # a frame longer than any may be
    "mute",  # nothing at all after its greeting
    "boastful",  # announces responses that it does not have, and answers with a miss
    "flatterer",  # serves well, and reports a very high popularity for everything
    "crowd",  # reports a hundred nodes that do not exist
    "echo",  # publishes other nodes' gossip again
    "stranger",  # outside the network, with forged proofs
    "inventor",  # reports a thousand owners, each with a document in the registry
    "flooder",  # publishes more than an author may, and as many invalid messages
    "relayer",  # serves responses that a member signed for a while, then its own
    "hinter",  # announces everything, and does not answer requests
]
OPEN_KINDS: tuple[Kind, ...] = ("relayer", "hinter")
ATTACKERS: tuple[Kind, ...] = ("inventor", "flooder", *OPEN_KINDS)  # with scenarios of their own
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind not in ATTACKERS)
LIES_FROM_MS = 40_000  # a relayer
BOAST_EVERY_MS = 1_000
BOASTS = 20
HEARD_MAX = 500
GHOSTS = 100
GHOSTS_AT_ONCE = 16
INVENTED = 1_000
INVENTED_ENTRIES = 5  # of each one's document
FLOOD_EVERY_MS = 20  # a message, which is more than an author may publish, and an invalid one
SILENCE = b""


class LyingHost(Protocol):
    """The part of its host that a liar uses (SimHost)."""

    @property
    def number(self) -> int: ...
    @property
    def key(self) -> SigningKey: ...
    @property
    def public_key(self) -> bytes: ...
    @property
    def network_key(self) -> bytes | None: ...
    @property
    def tag(self) -> bytes: ...
    @property
    def wall_ms(self) -> int: ...
    def later(self, delay_ms: float, act: Callable[[], None]) -> None: ...
    def tell(self, event: Event) -> None: ...


class Liar:
    """How `host` differs from an honest host."""

    def __init__(self, setting: Setting, host: LyingHost, kind: Kind) -> None:
        self.kind: Kind = kind
        self._setting = setting
        self._host = host
        self._rng = random.Random(f"{setting.seed}/liar/{host.number}")
        self._key = SigningKey(sha256(b"forger/%d" % host.number).digest())
        self._heard: dict[bytes, None] = {}
        self._gossip: list[tuple[str, bytes]] = []
        self._invented: list[SigningKey] = []
        self._flooded = 0

    def begin(self) -> None:
        """The host has booted."""
        self._host.later(BOAST_EVERY_MS, self._boast)
        if self.kind == "inventor":
            names = (sha256(b"invented/%d/%d" % (self._host.number, number)) for number in range(INVENTED))
            self._invented = [SigningKey(name.digest()) for name in names]
        if self.kind == "flooder":
            self._host.later(BOAST_EVERY_MS, self._flood)

    def overhear(self, topic: str, payload: bytes) -> None:
        """Gossip passes: announce the responses of others as its own."""
        if len(self._gossip) < HEARD_MAX:
            self._gossip.append((topic, payload))
        try:
            batch = decode_announcement(payload)
        except ProtocolViolation:
            return
        for entry in batch.entries:
            if isinstance(entry, ResponseEntry) and len(self._heard) < HEARD_MAX:
                self._heard[entry.request_hash] = None

    def answer(self, message: PeerRequest) -> bytes | None:
        """A lie, SILENCE, or None for the honest answer."""
        match message:
            case Greet():
                return None
            case Query(wanted):
                return self._answer_query(wanted)
            case WantPeers() if self.kind == "crowd":
                return encode(Peers(self._ghosts()))
            case WantPeers() if self.kind == "inventor":
                keys = self._rng.sample(self._invented, PEX_RECORDS_MAX)
                return encode(Peers(tuple(self._record_of(key, "10.8.0.1:4001") for key in keys)))
            case WantDeltas() if self.kind == "inventor":
                return encode(
                    Deltas(tuple(self._document_of(key) for key in self._rng.sample(self._invented, 100)), ())
                )
            case Ping() if self.kind != "mute":
                return None
            case _ if self.kind == "mute":
                return SILENCE
            case _ if self.kind == "garbled":
                return self._rng.randbytes(100)
            case _:
                return None

    def _answer_query(self, wanted: bytes) -> bytes | None:
        key = self._setting.keys.get(wanted)
        if key is None or self.kind in ("boastful", "crowd", "echo", "inventor", "flooder"):
            return None
        match self.kind:
            case "mute" | "hinter":
                return SILENCE
            case "relayer" if self._setting.agenda.now_ms < LIES_FROM_MS:
                network, wall_ms = self._setting.network_id, self._host.wall_ms
                relayed = compute(self._setting.departed, network, key, right_body(key), NO_MEMBER_TAG, wall_ms)
                return encode(self._hit(key, relayed.body, relayed))
            case "garbled":
                return self._rng.randbytes(100)
            case "oversized":
                return bytes(STREAM_FRAME_BYTES_MAX + 1)
            case _:
                return encode(self._false_hit(key))

    def _false_hit(self, key: RequestKey) -> Hit:
        host, wall_ms = self._host, self._host.wall_ms
        response = self._made(right_body(key), key, wall_ms)
        match self.kind:
            case "altered":
                return self._hit(key, b"altered " + response.body, response)
            case "forged" | "stranger" | "relayer":
                signer = self._key if self.kind == "forged" else host.key
                forged = compute(signer, self._setting.network_id, key, b"forged", host.tag, wall_ms)
                return self._hit(key, forged.body, forged)
            case "replayed":
                other = self._rng.choice(list(self._setting.keys.values()))
                replayed = self._made(right_body(other), other, wall_ms)
                return self._hit(self._rng.choice((key, other)), replayed.body, replayed)
            case "expired":
                old = self._made(
                    b"yesterday", key, wall_ms - RESPONSE_TTL_MS - self._rng.choice((1, 5)) * CLOCK_SKEW_MS
                )
                return self._hit(key, old.body, old)
            case _:
                return self._hit(key, response.body, response, popularity=(1 << 32) - 1)

    def _made(self, body: bytes, key: RequestKey, computed_at_ms: int) -> Response:
        host = self._host
        return compute(host.key, self._setting.network_id, key, body, host.tag, computed_at_ms)

    def _hit(self, key: RequestKey, body: bytes, response: Response, popularity: int = 0) -> Hit:
        nonce = self._rng.randbytes(12)
        network = self._setting.network_id
        return make_hit(key, network, nonce, body, response.proof, response.member, popularity)

    def _boast(self) -> None:
        host = self._host
        host.later(BOAST_EVERY_MS, self._boast)
        expires_at_ms = host.wall_ms + RESPONSE_TTL_MS
        names = list(self._setting.keys if self.kind in OPEN_KINDS else self._heard)
        for name in self._rng.sample(names, min(len(names), BOASTS)):
            host.tell(ResponseStored(name, expires_at_ms, True))
        if self._gossip and self.kind in ("echo", "garbled"):
            topic, payload = self._rng.choice(self._gossip)
            said = payload if self.kind == "echo" else self._rng.randbytes(len(payload))
            self._setting.gossip.publish(host.number, topic, said)

    def _ghosts(self) -> tuple[bytes, ...]:
        """Records of nodes that do not exist, with valid signatures."""
        host = self._host
        records = []
        first = self._rng.randrange(GHOSTS)
        for number in range(first, first + GHOSTS_AT_ONCE):
            key = SigningKey(sha256(b"ghost/%d/%d" % (host.number, number % GHOSTS)).digest())
            records.append(self._record_of(key, f"10.9.{number % 250}.1:4001"))
        return tuple(records)

    def _record_of(self, key: SigningKey, address: str) -> bytes:
        host, public_key = self._host, key.verify_key.encode()
        tag, expires_at_ms = self._tag_of(public_key), host.wall_ms + PEER_RECORD_TTL_MS
        record = PeerRecord(self._setting.network_id, public_key, host.wall_ms, expires_at_ms, address, "", tag)
        return record.sign(key).encode()

    def _document_of(self, key: SigningKey) -> bytes:
        host, owner = self._host, key.verify_key.encode()
        expires_at_ms = host.wall_ms + REGISTRY_TTL_MS
        entries = tuple((sha256(owner + bytes([n])).digest(), expires_at_ms) for n in range(INVENTED_ENTRIES))
        epoch = self._setting.wall_ms // 1_000 * 1_000
        delta = RegistryDelta(
            self._setting.network_id, owner, epoch, 0, "snapshot", expires_at_ms, payload_of(entries, ())
        )
        return encode_delta(delta, key)

    def _flood(self) -> None:
        host = self._host
        host.later(FLOOD_EVERY_MS, self._flood)
        self._flooded += 1
        entry = ResponseEntry(self._rng.randbytes(32), host.wall_ms + RESPONSE_TTL_MS)
        batch = Announcement(self._setting.network_id, host.public_key, self._flooded, host.wall_ms, (entry,))
        for said in (
            encode_announcement(batch, host.key),
            self._rng.randbytes(100),
        ):
            self._setting.gossip.publish(host.number, RESPONSE_TOPIC, said)

    def _tag_of(self, public_key: bytes) -> bytes:
        """A holder of the network key can make the member tag of any key."""
        key = self._host.network_key
        return member_tag(key, public_key) if key else NO_MEMBER_TAG
