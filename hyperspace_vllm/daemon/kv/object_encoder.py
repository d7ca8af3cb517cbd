"""Turns rows in the arena into a signed, committed, stored object; one object at a time, one row per job.

A row is a separate job so that a fetch's checks, in the same two threads, wait for one row at most.
"""

import asyncio
from contextlib import ExitStack

from ...core.events.prefix_writing import EncodeObject, ObjectEncoded, ObjectFailed
from ...core.events.vocabulary import PrefixEvent
from ...core.local.slab import Slab
from ...core.records.errors import Refused
from ...core.records.ids import NetworkId
from ...core.records.limits import CLOCK_SKEW_MS
from ...core.records.manifest import chunk_bytes_for, digest_blob
from ...core.records.sealing import seal_key
from .. import clock
from ..identity import Identity
from ..metrics import Metrics
from ..workers.compute_pool import ComputePool
from .chunk_store import ChunkStore
from .object_codec import ObjectRecord, encode_row, new_nonce, sign_anew, sign_record
from .row_cache import RowCache


class ObjectEncoder:
    """Performs EncodeObject effects: `lease` at once, then `encode`, which returns the answering event."""

    def __init__(
        self,
        network: NetworkId,
        identity: Identity,
        cache: RowCache,
        store: ChunkStore,
        compute: ComputePool,
        metrics: Metrics,
    ) -> None:
        self._network = network
        self._identity = identity
        self._cache = cache
        self._store = store
        self._compute = compute
        self._metrics = metrics
        self._turn = asyncio.Lock()

    def lease(self, effect: EncodeObject) -> list[Slab] | None:
        """Pin the rows until `encode` has ended; None if one has left the arena."""
        holder = ("encode", effect.object_id)
        slabs = [self._cache.lease(row_key, holder) for row_key in effect.row_keys]
        present = [slab for slab in slabs if slab is not None]
        if len(present) == len(slabs):
            return present
        self._cache.end_leases(holder)
        return None

    async def encode(self, effect: EncodeObject, slabs: list[Slab]) -> PrefixEvent:
        """Encode, commit, sign and store the leased rows."""
        try:
            async with self._turn:
                record = await self._encode(effect, slabs)
        except Refused as refused:
            return ObjectFailed(effect.object_id, refused.reason)
        finally:
            self._cache.end_leases(("encode", effect.object_id))
        return ObjectEncoded(effect.object_id, record.digest)

    async def sign_anew(self) -> list[ObjectRecord]:
        """Sign objects of this node again that were signed while its clock was ahead: peers would refuse them."""
        wall_ms = clock.wall_ms()
        signed = []
        for record in self._store.dated_after(wall_ms + CLOCK_SKEW_MS):
            if record.manifest.producer == self._identity.public_key:
                new = sign_anew(record, self._identity.signing_key, wall_ms)
                if await self._compute.run_in_background(self._store.replace, record.digest, new):
                    signed.append(new)
        return signed

    async def _encode(self, effect: EncodeObject, slabs: list[Slab]) -> ObjectRecord:
        compute, chunk_bytes, nonce = self._compute, chunk_bytes_for(effect.length), new_nonce()
        with ExitStack() as stack:
            new_object = self._store.new_object(len(slabs), chunk_bytes)
            writer = await compute.run_in_background(stack.enter_context, new_object)
            tables = []
            for index, (row_key, slab) in enumerate(zip(effect.row_keys, slabs, strict=True)):
                key = seal_key(row_key, self._network)
                area = writer.row(index)
                tables.append(
                    await compute.run_in_background(encode_row, self._cache.view(slab), key, nonce, chunk_bytes, area)
                )
            digests = b"".join(tables)
            commitment, proof = await compute.commit(digest_blob(digests, len(slabs)))
            record = self._sign(effect, chunk_bytes, nonce, digests, commitment, proof)
            await compute.run_in_background(self._store.publish, writer, record, effect.shareable)
        self._metrics.bytes_total.labels("stored").inc(effect.length * len(slabs))
        self._metrics.bytes_total.labels("copied").inc(effect.length * len(slabs))  # sealed from the arena to the file
        return record

    def _sign(
        self,
        effect: EncodeObject,
        chunk_bytes: int,
        nonce: bytes,
        digests: bytes,
        commitment: bytes,
        proof: bytes,
    ) -> ObjectRecord:
        rows = tuple((key, effect.length) for key in effect.row_keys)
        return sign_record(
            self._identity.signing_key,
            self._network,
            effect.layout.fingerprint,
            chunk_bytes,
            nonce,
            rows,
            digests,
            commitment,
            proof,
            clock.wall_ms(),
        )
