"""Requests between nodes: what peers ask of this one, until the core has answered, and what it asks of them."""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from ...core.events.conduct import PeerMisbehaved
from ...core.events.peer_requests import RequestReceived, ServeResponse
from ...core.events.vocabulary import NetworkEvent
from ...core.peers.trust import Trust
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import PeerId, public_key_of
from ...core.records.peer_wire import (
    Expected,
    Hit,
    Miss,
    PeerAnswer,
    PeerRequest,
    Refusal,
    decode_answer,
    decode_request,
    encode,
    expected_answer,
    protocol_of,
)
from ...core.records.reason import Reason
from ..metrics import Metrics
from ..peer_failed import PeerFailed
from ..responses.answer_places import AskingPeer
from ..responses.response_server import ResponseServer

log = logging.getLogger(__name__)

REPLY_S = 5.0  # the core answers at once; serving a response reads the disk


class Asks(Protocol):
    """What asks a connected peer (Libp2pHost)."""

    async def request(self, peer: PeerId, protocol: str, frame: bytes, timeout_s: float, expected: Expected) -> bytes:
        """Its answer, refused unread if it is longer than expected; `PeerFailed`."""


async def ask_peer(host: Asks, peer: PeerId, message: PeerRequest, timeout_s: float) -> PeerAnswer:
    """A peer's answer; `PeerFailed`, also for one that is malformed."""
    frame = await host.request(peer, protocol_of(message), encode(message), timeout_s, expected_answer(message))
    try:
        return decode_answer(frame)
    except ProtocolViolation as violation:
        log.info("peer %s broke the protocol: %s", peer, violation, extra={"peer": peer})
        raise PeerFailed(Reason.PROTOCOL) from violation


class PeerRequests:
    """Peers' open requests, by the tokens under which the core answers them."""

    def __init__(self, trust: Trust, metrics: Metrics, submit: Callable[[NetworkEvent], None]) -> None:
        self._trust = trust
        self._metrics = metrics
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        self._tokens = 0
        self._replies: dict[int, asyncio.Future[PeerAnswer]] = {}
        self._askers: dict[int, PeerId] = {}

    async def answer(self, peer: PeerId, protocol: str, frame: bytes) -> bytes | None:
        """Answer a peer's request; None resets its stream."""
        try:
            message = decode_request(frame)
            if protocol_of(message) != protocol:
                raise ProtocolViolation(f"{type(message).__name__} on {protocol}")
        except ProtocolViolation as violation:
            log.info("peer %s broke the protocol: %s", peer, violation, extra={"peer": peer})
            self._submit(PeerMisbehaved(peer))
            return None
        self._tokens += 1
        token = self._tokens
        reply = self._replies[token] = self._loop.create_future()
        self._askers[token] = peer
        try:
            self._submit(RequestReceived(token, peer, message))
            async with asyncio.timeout(REPLY_S):
                return encode(await reply)
        except TimeoutError:
            return encode(Refusal("busy"))
        finally:
            del self._replies[token], self._askers[token]

    def reply(self, token: int, message: PeerAnswer) -> None:
        """The core's answer; a request that is over is ignored."""
        reply = self._replies.get(token)
        if reply is not None and not reply.done():
            reply.set_result(message)

    async def serve(self, effect: ServeResponse, responses: ResponseServer | None) -> None:
        """Answer with a stored response, if the asker may have it."""
        answer: Hit | Miss = Miss("unknown")
        peer = self._askers.get(effect.token)
        if responses is not None and peer is not None:
            asker = AskingPeer(peer, self._trust.is_chosen(public_key_of(peer)), self._trust.has_standing(peer))
            answer = await responses.answer(effect.request_hash, effect.popularity, asker)
        if isinstance(answer, Hit):
            self._metrics.bytes_total.labels("served").inc(len(answer.sealed))
        self.reply(effect.token, answer)
