"""Manifests that this node trusts: fetched from peers and verified once each, or from its own store."""

import asyncio
from collections import OrderedDict
from dataclasses import replace

from ...core.peers.trust import Trust
from ...core.records.errors import ProtocolViolation, Refused
from ...core.records.ids import ManifestDigest, NetworkId, PeerId
from ...core.records.manifest import check_manifest, digest_blob
from .. import clock
from ..workers.compute_pool import ComputePool
from .chunk_store import ChunkStore
from .chunk_transport import ChunkTransport
from .object_codec import ObjectRecord, read_record

RECORDS_MAX = 256  # with their digest tables at most 18 MiB
CONDEMNED_MAX = 4096


class Manifests:
    """Verified records by digest; `trust` decides which producers count."""

    def __init__(
        self,
        network: NetworkId,
        trust: Trust,
        store: ChunkStore,
        transport: ChunkTransport,
        compute: ComputePool,
    ) -> None:
        self._network = network
        self._trust = trust
        self._store = store
        self._transport = transport
        self._compute = compute
        self._records: OrderedDict[ManifestDigest, ObjectRecord] = OrderedDict()
        self._condemned: OrderedDict[ManifestDigest, None] = OrderedDict()

    def known(self, digest: ManifestDigest) -> ObjectRecord | None:
        """A record that was verified before, or None; `Refused("condemned")`."""
        if digest in self._condemned:
            raise Refused("condemned")
        record = self._records.get(digest)
        if record is not None:
            self._records.move_to_end(digest)
        return record or self._store.record(digest)

    async def fetch(self, peer: PeerId, digest: ManifestDigest, timeout_s: float) -> ObjectRecord:
        """The verified record, fetched from `peer`. `Refused` (malformed, forged, bad_proof, …) or `PeerFailed`."""
        if not self._compute.can_verify:
            raise Refused("kzg_worker", "starting")  # a miss at once, not a wait that would count as the peer's stall
        deadline = asyncio.get_running_loop().time() + timeout_s
        reply = await self._transport.manifest(peer, digest, timeout_s)
        try:
            record = read_record(reply.manifest, reply.digests, reply.proof)
        except ProtocolViolation as violation:
            raise Refused("malformed", str(violation)) from violation
        manifest = record.manifest
        if record.digest != digest:
            raise Refused("forged", "not the manifest that was asked for")
        now = clock.now()
        self._trust.meet(manifest.producer, reply.member)
        check_manifest(manifest, self._network, lambda producer: self._trust.trusts_kv(producer, now), now.wall_ms)
        blob = digest_blob(record.digests, len(manifest.rows))
        left_s = deadline - asyncio.get_running_loop().time()
        if not await self._compute.verify(blob, manifest.commitment, record.proof, left_s):
            raise Refused("bad_proof")
        record = replace(record, member=self._trust.vouch(manifest.producer))
        self._records[digest] = record
        if len(self._records) > RECORDS_MAX:
            self._records.popitem(last=False)
        return record

    def condemn(self, digest: ManifestDigest) -> None:
        """Never trust the manifest again: its producer committed to chunks that are no codeword."""
        self._records.pop(digest, None)
        self._condemned[digest] = None
        if len(self._condemned) > CONDEMNED_MAX:
            self._condemned.popitem(last=False)
