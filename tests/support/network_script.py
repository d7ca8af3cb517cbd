"""Transcripts of events and their effects, for the tests of a node's network part.

In a transcript `> ` starts an event, the lines below it are its effects; time only moves by `at=`, in ms since the
start. Peers are numbers, responses are letters.
"""

import textwrap

from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.connections import Disconnect, PeerConnected, PeerDisconnected
from hyperspace_vllm.core.events.dht import Provide, ProvidersFound, SearchDht
from hyperspace_vllm.core.events.gossip import GossipReceived, Publish
from hyperspace_vllm.core.events.known_peers import PeersChanged
from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.peer_requests import (
    Reply,
    RequestReceived,
    Send,
)
from hyperspace_vllm.core.events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponseWanted,
)
from hyperspace_vllm.core.events.vocabulary import NetworkEffect, NetworkEvent
from hyperspace_vllm.core.node.network_part import NetworkPart
from hyperspace_vllm.core.records.announcement import (
    RESPONSE_TOPIC,
    Announcement,
    ResponseEntry,
    decode_announcement,
    encode_announcement,
)
from hyperspace_vllm.core.records.ids import PeerId, sha256
from hyperspace_vllm.core.records.limits import (
    PEER_RECORD_TTL_MS,
    RESPONSE_TTL_MS,
)
from hyperspace_vllm.core.records.peer_wire import (
    Greet,
    PeerRequest,
)
from hyperspace_vllm.core.records.reason import Reason
from tests.support.moments import at, dated
from tests.support.network_world import (
    NETWORK,
    NOW_MS,
    Identity,
    make_node,
)


def response(letter: str) -> bytes:
    return sha256(b"response", letter.encode())


def letter_of(name: bytes) -> str:
    return next(chr(code) for code in range(ord("a"), ord("z") + 1) if response(chr(code)) == name)


def gossip(number: int, letters: str, sequence: int, now_ms: int, ttl_ms: int = RESPONSE_TTL_MS) -> GossipReceived:
    """A peer's announcement."""
    who = Identity(number)
    entries = tuple(ResponseEntry(response(letter), now_ms + ttl_ms) for letter in letters)
    batch = Announcement(NETWORK, who.public_key, sequence, now_ms, entries)
    return GossipReceived(RESPONSE_TOPIC, who.peer, encode_announcement(batch, who.key))


class Script:
    """Runs a transcript against one NetworkPart; `silent` leaves out effects that are of no interest."""

    def __init__(self, node: NetworkPart | None = None, also: str = "") -> None:
        self.node = node or make_node()
        self.now_ms = NOW_MS
        self.shown = {"hint", "fetch", "search", "answer", "charge", "disconnect", *also.split()}
        self.sends: dict[int, Send] = {}

    def run(self, transcript: str) -> None:
        lines = [line.split("#")[0].rstrip() for line in textwrap.dedent(transcript).strip().splitlines()]
        turns: list[tuple[str, list[str]]] = []
        for line in (line for line in lines if line):
            if line.startswith("> "):
                turns.append((line[2:], []))
            else:
                turns[-1][1].append(line.strip())
        for command, expected in turns:
            assert self.act(command) == expected, f"after `{command}`"

    def act(self, command: str) -> list[str]:
        words = command.split()
        if words[0].startswith("at="):
            self.now_ms = NOW_MS + int(words.pop(0)[3:])
        effects: list[NetworkEffect] = []
        for event in self.events(words):
            new = self.node.handle(event, dated(self.now_ms))
            self.sends |= {effect.request: effect for effect in new if isinstance(effect, Send)}
            effects += new
        return [text for text in map(self.told, effects) if text.split()[0] in self.shown]

    def events(self, words: list[str]) -> list[NetworkEvent | Tick]:
        match words:
            case ["meet", *numbers]:
                return [event for number in numbers for event in self.meeting(int(number))]
            case ["gone", number]:
                return [PeerDisconnected(Identity(int(number)).peer)]
            case ["gossip", number, letters]:
                return [gossip(int(number), letters, self.now_ms, self.now_ms)]
            case ["want", letter, *numbers]:
                told = tuple(Identity(int(number)).peer for number in numbers)
                return [ResponseWanted(ord(letter), response(letter), 300, told)]
            case ["release", letter]:
                return [ResponseReleased(ord(letter))]
            case ["got", letter, number]:
                expires_at_ms = self.now_ms + RESPONSE_TTL_MS
                return [ResponseFetched(ord(letter), Identity(int(number)).peer, 9, expires_at_ms, 16)]
            case ["refused", letter, number, reason]:
                return [ResponseRefused(ord(letter), Identity(int(number)).peer, Reason(reason))]
            case ["found", letter, *numbers]:
                peers = tuple(Identity(int(number)).peer for number in numbers)
                return [ProvidersFound(ord(letter), peers, 10.0)]
            case ["tick"]:
                return [Tick()]
            case _:
                raise ValueError(words)

    def meeting(self, number: int) -> list[NetworkEvent | Tick]:
        who = Identity(number)
        record = who.record(self.now_ms, self.now_ms + PEER_RECORD_TTL_MS)
        return [PeerConnected(who.peer, who.host), RequestReceived(number, who.peer, Greet(record))]

    def told(self, effect: NetworkEffect) -> str:
        match effect:
            case HintResponse(_, hinted):
                return f"hint {'yes' if hinted else 'no'}"
            case FetchResponse(lookup, peer, _, _, timeout_ms):
                return f"fetch {chr(lookup)} from {number_of(peer)} for {timeout_ms}"
            case SearchDht(lookup):
                return f"search {chr(lookup)}"
            case AnswerResponse(lookup, peer, source, reason):
                return f"answer {chr(lookup)} {number_of(peer) if peer else 'none'} {source} {reason}"
            case ChargePeer(peer, reason):
                return f"charge {number_of(peer)} {reason}"
            case Disconnect(peer):
                return f"disconnect {number_of(peer)}"
            case PeersChanged(usable):
                return f"peers {' '.join(str(number_of(record.peer)) for record in usable)}".rstrip()
            case Publish(_, payload):
                entries = decode_announcement(payload).entries
                return "publish " + "".join(letter_of(e.request_hash) for e in entries if isinstance(e, ResponseEntry))
            case Provide(key):
                return f"provide {letter_of(bytes.fromhex(key.removeprefix('/cache/')))}"
            case Reply(_, message):
                return f"reply {type(message).__name__}"
            case Send(_, peer, message):
                return f"send {number_of(peer)} {type(message).__name__}"
            case _:
                return type(effect).__name__.lower()


def number_of(peer: PeerId) -> int:
    return next(number for number in range(100) if Identity(number).peer == peer)


def asked(node: NetworkPart, message: PeerRequest, number: int = 1, now_ms: int = NOW_MS) -> list[NetworkEffect]:
    return node.handle(RequestReceived(1, Identity(number).peer, message), dated(now_ms))


def tick(node: NetworkPart, now_ms: int, set_by_ms: int = 0) -> list[NetworkEffect]:
    """A tick, after which the next deadline must lie ahead; the wall clock was set by so much."""
    now = at(dated(now_ms).mono_ms, set_by_ms)
    effects = node.handle(Tick(), now)
    due_ms = node.next_deadline_ms()
    assert due_ms is None or due_ms > now.mono_ms
    return effects
