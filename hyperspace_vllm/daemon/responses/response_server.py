"""Answers peers' queries from the response database: by request hash, checked again, sealed, with a member tag.

If a disk hangs, peers get `busy` and the node is not affected: a few separate threads read the database, and a query
that waits too long is given up. Unknown peers have one thread and few places (answer_places.py); of an entry that they
may not get only the scope is read. A response was checked before it was stored, and is checked again here, so that a
damaged page does not make an honest node send a false response.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec

from ...core.records.errors import Refused
from ...core.records.ids import NetworkId
from ...core.records.peer_wire import Hit, Miss
from ...core.records.sealing import NONCE_BYTES
from ...core.records.signing import NO_MEMBER_TAG
from ...core.response.cache_proof import check_statement, decode_proof, request_hash
from ...core.response.sealed_hit import make_hit
from ...response_db import ResponseReader, Shareable
from ..clock import wall_ms
from .answer_places import AnswerPlaces, AskingPeer

ANSWER_S = 0.25
_THREADS = 4
_STRANGERS_THREADS = 1  # hence one core at most


class ResponseServer:
    """`vouch(signer)` returns the member tag of a proof's signer (Trust.vouch), on the event loop."""

    def __init__(
        self,
        path: Path,
        network: NetworkId,
        vouch: Callable[[bytes], bytes],
        clock: Callable[[], int] = wall_ms,
    ) -> None:
        self._network = network
        self._vouch = vouch
        self._clock = clock
        self._readers = _Readers(path)
        self._places = AnswerPlaces()
        self._threads = ThreadPoolExecutor(_THREADS, "hyperspace-response-server")
        self._strangers_threads = ThreadPoolExecutor(_STRANGERS_THREADS, "hyperspace-response-server")
        self._closed = False

    async def answer(self, request_hash: bytes, popularity: int, asker: AskingPeer) -> Hit | Miss:
        """The response with this request hash, if it is here and the peer may get it. Never raises, takes 250 ms.

        Only members get responses that are shared with the network; others get public ones.
        """
        if self._closed:
            return Miss("busy")
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._places.take(asker)
                made = await self._made(request_hash, popularity, asker)
        except TimeoutError:
            return Miss("busy")
        if made is None:
            return Miss("unknown")
        hit, signer = made
        return msgspec.structs.replace(hit, member=self._vouch(signer))

    def close(self) -> None:
        """Stop answering; answers in progress are finished, but not waited for."""
        self._closed = True
        self._threads.shutdown(wait=False)
        self._strangers_threads.shutdown(wait=False)
        self._readers.close()

    async def _made(self, wanted: bytes, popularity: int, asker: AskingPeer) -> tuple[Hit, bytes] | None:
        """Made in a thread; the peer's place is free again when that is done, also if no peer waits for it."""
        loop = asyncio.get_running_loop()
        threads = self._threads if asker.has_standing else self._strangers_threads

        def done(_: Future[tuple[Hit, bytes] | None]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._places.free, asker)

        try:
            making = threads.submit(self._make, wanted, popularity, asker.is_member)
        except RuntimeError:  # closed meanwhile
            self._places.free(asker)
            return None
        making.add_done_callback(done)
        return await asyncio.wrap_future(making)

    def _make(self, wanted: bytes, popularity: int, to_member: bool) -> tuple[Hit, bytes] | None:
        """The sealed response and its proof's signer, in a thread."""
        now_ms = self._clock()
        found = self._readers.find(wanted, now_ms, to_member)
        if found is None:
            return None
        signer = self._checked_signer(found, wanted, now_ms)
        if signer is None:
            return None
        body, proof, nonce = found.response.body, found.response.proof, os.urandom(NONCE_BYTES)
        return make_hit(found.key, self._network, nonce, body, proof, NO_MEMBER_TAG, popularity), signer

    def _checked_signer(self, found: Shareable, wanted: bytes, now_ms: int) -> bytes | None:
        """None if a peer would refuse it; the reader has compared body and proof."""
        proof = decode_proof(found.response.proof)
        if request_hash(self._network, found.key) != wanted:
            return None
        try:
            check_statement(proof, wanted, proof.model_digest, lambda signer: True, now_ms)
        except Refused:
            return None
        return proof.signer


class _Readers:
    """One ResponseReader a thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._idle: list[ResponseReader] = []
        self._closed = False

    def find(self, request_hash: bytes, now_ms: int, to_member: bool) -> Shareable | None:
        with self._lock:
            reader = self._idle.pop() if self._idle else ResponseReader(self._path)
        found = reader.find_by_hash(request_hash, now_ms, to_member)
        with self._lock:
            if self._closed:
                reader.close()
            else:
                self._idle.append(reader)
        return found

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for reader in self._idle:
                reader.close()
            self._idle.clear()
