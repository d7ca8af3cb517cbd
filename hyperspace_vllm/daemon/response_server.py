"""Answers peers' queries from the response database: found by its request hash, checked again, sealed, vouched for.

A disk that hangs costs its askers a `busy` and this node nothing: the database is read in threads of its own, few of
them, and a query that waits too long is given up. What is served was checked before it was stored, and is checked again
here, because a damaged page must not make a liar of an honest node.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from ..core.records.errors import Refused
from ..core.records.ids import NetworkId
from ..core.records.peer_wire import Hit, Miss
from ..core.records.sealing import NONCE_BYTES
from ..core.records.signing import NO_MEMBER_TAG
from ..core.response.cache_proof import check_statement, decode_proof, request_hash
from ..core.response.exchange import make_hit
from ..response_db import ResponseReader, Shareable
from .response_store import wall_clock_ms

ANSWERS_MAX = 16  # being made at once, those included that nobody waits for any more
ANSWER_S = 0.25
_THREADS = 4


class ResponseServer:
    """`vouch(signer)` gives the member tag of a proof's signer (Trust.vouch), on the event loop."""

    def __init__(
        self,
        path: Path,
        network: NetworkId,
        vouch: Callable[[bytes], bytes],
        clock: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._network = network
        self._vouch = vouch
        self._clock = clock
        self._readers = _Readers(path)
        self._free = threading.BoundedSemaphore(ANSWERS_MAX)
        self._threads = ThreadPoolExecutor(_THREADS, "hyperspace-response-server")
        self._closed = False

    async def answer(self, request_hash: bytes, popularity: int, to_member: bool) -> Hit | Miss:
        """The response with this request hash, if it is here and may go to whoever asks. Raises nothing, takes 250 ms.

        Only members get what is shared with the network; the rest get what is public.
        """
        if self._closed or not self._free.acquire(blocking=False):
            return Miss("busy")
        making = self._threads.submit(self._make, request_hash, popularity, to_member)
        making.add_done_callback(self._freed)
        try:
            async with asyncio.timeout(ANSWER_S):
                made = await asyncio.wrap_future(making)
        except TimeoutError:
            return Miss("busy")
        if made is None:
            return Miss("unknown")
        hit, signer = made
        return msgspec.structs.replace(hit, member=self._vouch(signer))

    def close(self) -> None:
        """Answer no more; what is being made is finished, but not waited for."""
        self._closed = True
        self._threads.shutdown(wait=False)
        self._readers.close()

    def _make(self, wanted: bytes, popularity: int, to_member: bool) -> tuple[Hit, bytes] | None:
        """The sealed response and its proof's signer, in a thread."""
        now_ms = self._clock()
        found = self._readers.find(wanted, now_ms)
        if found is None or not (to_member or found.scope == "public"):
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

    def _freed(self, making: Future[tuple[Hit, bytes] | None]) -> None:
        self._free.release()


class _Readers:
    """One ResponseReader a thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._idle: list[ResponseReader] = []
        self._closed = False

    def find(self, request_hash: bytes, now_ms: int) -> Shareable | None:
        with self._lock:
            reader = self._idle.pop() if self._idle else ResponseReader(self._path)
        found = reader.find_by_hash(request_hash, now_ms)
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
