"""Performs what the core decides about prefixes with sockets, files and threads; what comes of it becomes events.

A bug of our own is logged with its traceback, counted as `bug`, and ends as a miss.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Literal, Protocol, assert_never

from ...core.events.conduct import ChargePeer
from ...core.events.known_peers import KvPeersChanged
from ...core.events.prefix_reading import (
    AnswerPrefix,
    EndLookup,
    FetchManifest,
    FetchRow,
    FindRowHolders,
    FindRows,
    HolderStalled,
    LoadRow,
    ManifestRefused,
    ManifestVerified,
    PrefixReleased,
    PrefixWanted,
    ProviderAnswered,
    ProviderFailed,
    ReleaseRows,
    RowFailed,
    RowOffer,
    RowsFound,
)
from ...core.events.prefix_writing import (
    DropStaged,
    EncodeObject,
    KeepRow,
    ObjectEncoded,
    ObjectFailed,
    RowsStored,
    UnpinRows,
)
from ...core.events.vocabulary import Event, PrefixEffect
from ...core.local.slab import LoadedRow, Slab
from ...core.peers.trust import Trust
from ...core.records.errors import Refused
from ...core.records.ids import ManifestDigest, NetworkId, PeerId, RowKey, peer_id, row_id
from ...core.records.limits import LOOKUP_ROWS_MAX
from ...core.records.reason import Reason
from .. import clock
from ..identity import Identity
from ..kv.chunk_keeper import ChunkKeeper
from ..kv.chunk_store import ChunkStore
from ..kv.chunk_transport import ChunkTransport
from ..kv.manifests import Manifests
from ..kv.object_codec import ObjectRecord
from ..kv.object_encoder import ObjectEncoder
from ..kv.row_assembly import RowAssembly
from ..kv.row_cache import UNSTORED, RowCache
from ..kv.row_loading import RowLoading
from ..metrics import Metrics
from ..peer_failed import PeerFailed
from ..workers.compute_pool import ComputePool
from .lookup_tasks import LookupTasks

log = logging.getLogger(__name__)

SIGN_ANEW_S = 1.0
CLOSE_S = 5.0  # for what is being written
VERIFIED_BY = {"none": "", "memory": "memory", "disk": "blake3", "network": "ed25519+kzg+blake3"}


class Staged(Protocol):
    """The slabs that workers have filled (Staging)."""

    def take(self, staged: int) -> Slab | None:
        """The slab, now the caller's to keep or free; None if it is gone."""

    def drop(self, staged: int, reason: str) -> None:
        """Free the slab; `reason` is a metric label."""


class PrefixClients(Protocol):
    """Where lookups are answered (PrefixLookups)."""

    def answer(
        self,
        lookup: int,
        end_segment: int,
        rows: tuple[LoadedRow, ...],
        source: Literal["none", "memory", "disk", "network"],
        verified_by: str,
        reason: str,
    ) -> bool:
        """Answer a lookup; False: its client can't be told, and will not release it."""


class PrefixEffects:
    """Everything happens on the loop that it was built on. What comes of effects goes to `submit`."""

    def __init__(
        self,
        cache: RowCache,
        store: ChunkStore,
        transport: ChunkTransport,
        compute: ComputePool,
        metrics: Metrics,
        identity: Identity,
        network: NetworkId,
        trust: Trust,
        staging: Staged,
        clients: PrefixClients,
        submit: Callable[[Event], None],
    ) -> None:
        self._cache = cache
        self._store = store
        self._transport = transport
        self._compute = compute
        self._metrics = metrics
        self._network = network
        self._trust = trust
        self._staging = staging
        self._clients = clients
        self._submit = submit
        self._tasks = LookupTasks("l2", metrics)  # those of the assembly belong to no lookup here
        store.forget_others(self._counts)
        self._manifests = Manifests(network, trust, store, transport, compute)
        self._encoder = ObjectEncoder(network, identity, cache, store, compute, metrics)
        self._keeper = ChunkKeeper(store, metrics, self._report_stored)
        self._assembly = RowAssembly(
            network, cache, transport, compute, metrics, submit, self._spawn, self._keep, self._condemn
        )
        self._loading = RowLoading(network, cache, store, compute, metrics, submit, self._start, self._discard)
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._signing = self._loop.call_soon(self._sign_anew)
        self._unanswered: dict[int, float] = {}  # lookup -> when it began
        self._failures: dict[int, Counter[str]] = {}  # lookup -> what went wrong on its way
        self._last_lookup: dict[str, object] = {}
        self._objects_stored = 0
        metrics.rows.labels("disk").set_function(lambda: store.rows)
        metrics.store_bytes.labels("disk").set_function(lambda: store.used_bytes)

    def report_stored(self) -> None:
        """Report everything that is on the disk: what earlier runs of this node left."""
        for record, rows in self._store.shareable():
            self._report_stored(record, rows)

    def status(self, waiting_rows: int) -> dict[str, object]:
        """What `hyperspace status` shows of prefixes: what is being written, and how the last lookup ended."""
        return {
            "publish": {"waiting_rows": waiting_rows, "objects": self._objects_stored},
            "last_lookup": self._last_lookup,
        }

    async def close(self) -> None:
        """End lookups, give writes a moment, and close compute pool and transport."""
        self._closed = True
        for lookup in self._tasks.lookups:
            self._end_lookup(lookup)
        self._signing.cancel()
        await self._tasks.close(CLOSE_S)
        await self._transport.close()
        self._keeper.close()
        await self._compute.close()

    # --- events in, effects out -----------------------------------------------------------------

    def note(self, event: Event) -> None:
        """The core is about to handle an event: count it, where it says how a lookup or an object fares."""
        match event:
            case PrefixWanted():
                self._unanswered[event.lookup] = self._loop.time()
                self._failures[event.lookup] = Counter()
            case PrefixReleased():
                self._unanswered.pop(event.lookup, None)
                self._failures.pop(event.lookup, None)
            case ObjectEncoded():
                self._objects_stored += 1
            case ProviderFailed() | ManifestRefused() | HolderStalled() | RowFailed():
                self._metrics.failures_total.labels("l2", event.reason).inc()
                if event.lookup in self._failures:
                    self._failures[event.lookup][event.reason] += 1
            case ObjectFailed():
                self._metrics.failures_total.labels("l2", event.reason).inc()

    def perform(self, effect: PrefixEffect | KvPeersChanged) -> None:
        """Do what the core decided."""
        match effect:
            case FindRows():
                self._find_rows(effect)
            case LoadRow():
                self._loading.load(effect)
            case ReleaseRows(lookup, row_keys):
                self._assembly.end_some(lookup, row_keys)
                self._cache.end_some(lookup, row_keys)
            case FindRowHolders():
                for peer in effect.peers:
                    failed = ProviderFailed(effect.lookup, peer, Reason.BUG)
                    self._start(effect.lookup, self._ask_provider(effect, peer), failed)
            case FetchManifest():
                refused = ManifestRefused(effect.lookup, effect.peer, effect.manifest, Reason.BUG)
                self._start(effect.lookup, self._fetch_manifest(effect), refused)
            case FetchRow():
                self._fetch_row(effect)
            case EndLookup(lookup):
                self._end_lookup(lookup)
            case AnswerPrefix():
                self._answer(effect)
            case ChargePeer(peer, reason):
                self._transport.count_charge(peer, reason)
            case KeepRow(staged, row_key):
                slab = self._staging.take(staged)
                if slab is not None:
                    self._cache.keep(row_key, slab)
                    self._cache.lease(row_key, UNSTORED)
            case UnpinRows(row_keys):
                self._cache.end_some(UNSTORED, row_keys)
            case DropStaged(staged, reason):
                self._staging.drop(staged, reason)
            case EncodeObject():
                self._encode(effect)
            case KvPeersChanged(admitted, endpoints):
                self._transport.admit(admitted)
                self._transport.set_peers(endpoints)
            case _:
                assert_never(effect)

    # --- tasks ----------------------------------------------------------------------------------

    def _start(self, lookup: int, work: Coroutine[None, None, None], if_bug: Event) -> asyncio.Task[None]:
        """Run a lookup's work until it ends or the lookup does."""
        return self._tasks.start(lookup, work, partial(self._submit, if_bug))

    def _spawn(self, work: Coroutine[None, None, None], if_bug: Event) -> asyncio.Task[None]:
        return self._tasks.spawn(work, partial(self._submit, if_bug))

    def _end_lookup(self, lookup: int, keep: frozenset[RowKey] = frozenset()) -> None:
        self._tasks.end(lookup)
        self._assembly.end(lookup)
        self._cache.end_leases(lookup, keep)

    # --- reading --------------------------------------------------------------------------------

    def _find_rows(self, effect: FindRows) -> None:
        in_memory = frozenset(key for key in effect.row_keys if key in self._cache)
        on_disk = frozenset(
            key for key in effect.row_keys if key not in in_memory and self._store.holds(row_id(self._network, key))
        )
        leased = frozenset(filter(self._cache.is_leased, in_memory))
        self._submit(RowsFound(effect.lookup, in_memory, on_disk, leased, self._cache.room_bytes))

    async def _ask_provider(self, effect: FindRowHolders, peer: PeerId) -> None:
        row_ids = effect.row_ids[:LOOKUP_ROWS_MAX]
        began = self._loop.time()
        try:
            reply = await self._transport.find(peer, row_ids, effect.timeout_ms / 1000)
        except PeerFailed as failed:
            self._submit(ProviderFailed(effect.lookup, peer, failed.reason))
            return
        offers = tuple(
            RowOffer(
                row_ids[offer.index],
                ManifestDigest(offer.manifest),
                offer.row,
                int.from_bytes(offer.columns, "big"),
            )
            for offer in reply.offers
        )
        rtt_ms = int((self._loop.time() - began) * 1000)
        self._submit(ProviderAnswered(effect.lookup, peer, offers, rtt_ms))

    async def _fetch_manifest(self, effect: FetchManifest) -> None:
        try:
            record = self._manifests.known(effect.manifest)
            if record is None:
                timeout_s = effect.timeout_ms / 1000
                record = await self._manifests.fetch(effect.peer, effect.manifest, timeout_s)
        except (Refused, PeerFailed) as failed:
            reason = Reason(failed.reason)
            self._submit(ManifestRefused(effect.lookup, effect.peer, effect.manifest, reason))
            return
        manifest = record.manifest
        if not record.has_true_tags(effect.row_keys):  # the producer signed the digests: its lie, not the holder's
            self._condemn(effect.manifest)
            producer = peer_id(manifest.producer)
            self._submit(ManifestRefused(effect.lookup, effect.peer, effect.manifest, Reason.BAD_TAG, producer))
            return
        self._submit(
            ManifestVerified(
                effect.lookup,
                effect.peer,
                effect.manifest,
                manifest.fingerprint,
                tuple(row.row_id for row in manifest.rows),
                tuple(row.length for row in manifest.rows),
                manifest.chunk_bytes,
            )
        )

    def _fetch_row(self, effect: FetchRow) -> None:
        try:
            record = self._manifests.known(effect.manifest)
        except Refused:
            record = None
        if record is None:  # condemned, or forgotten since it was verified
            self._submit(RowFailed(effect.lookup, effect.row_key, "condemned"))
        else:
            self._assembly.fetch(effect, record)

    def _keep(self, record: ObjectRecord, row: int, chunks: dict[int, memoryview]) -> None:
        work = self._keeper.keep(record, row, chunks)
        if work is not None:
            self._tasks.spawn(work)

    def _report_stored(self, record: ObjectRecord, rows: tuple[int, ...]) -> None:
        if self._store.record(record.digest) is None:
            return  # gone again
        shareable = self._store.record(record.digest, for_peer=True) is not None
        manifest = record.manifest
        row_ids = tuple(manifest.rows[row].row_id for row in rows)
        self._submit(RowsStored(record.digest, manifest.fingerprint, manifest.commitment, row_ids, shareable))

    def _counts(self, record: ObjectRecord) -> bool:
        """Whether an object of an earlier run still counts."""
        self._trust.meet(record.manifest.producer, record.member)
        return self._trust.trusts_kv(record.manifest.producer, clock.now())

    def _condemn(self, digest: ManifestDigest) -> None:
        self._manifests.condemn(digest)
        self._discard(digest)

    def _discard(self, digest: ManifestDigest) -> None:
        self._tasks.spawn(self._keeper.discard(digest))

    def _answer(self, effect: AnswerPrefix) -> None:
        rows = []
        for segment, part, rank, row_key in effect.rows:
            slab = self._cache.lease(row_key, effect.lookup)
            assert slab is not None, "the core answered with a row that isn't leased"
            rows.append(LoadedRow(segment, part, rank, slab))
        self._end_lookup(effect.lookup, frozenset(row_key for _, _, _, row_key in effect.rows))
        began = self._unanswered.pop(effect.lookup, self._loop.time())
        result = "hit" if effect.end_segment else "miss"
        self._metrics.lookups_total.labels("l2", result, effect.reason).inc()
        took_s = self._loop.time() - began
        failures = self._failures.pop(effect.lookup, Counter())
        if effect.reason == "arena_full" and not failures["arena_full"]:  # cut short before any row failed
            self._metrics.failures_total.labels("l2", "arena_full").inc()
        self._metrics.lookup_seconds.labels("l2").observe(took_s)
        self._last_lookup = {
            "result": result,
            "reason": effect.reason,
            "source": effect.source,
            "verified_by": VERIFIED_BY[effect.source],
            "rows": len(rows),
            "took_ms": round(took_s * 1000, 1),
            "failures": dict(failures),
        }
        sent = self._clients.answer(
            effect.lookup,
            effect.end_segment,
            tuple(rows),
            effect.source,
            VERIFIED_BY[effect.source],
            effect.reason,
        )
        if not effect.end_segment or not sent:  # no client will release it
            self._submit(PrefixReleased(effect.lookup))

    # --- writing --------------------------------------------------------------------------------

    def _encode(self, effect: EncodeObject) -> None:
        slabs = self._encoder.lease(effect)
        if slabs is None:
            self._submit(ObjectFailed(effect.object_id, "evicted"))
            return

        async def encode() -> None:
            encoded = await self._encoder.encode(effect, slabs)
            self._submit(encoded)
            if isinstance(encoded, ObjectEncoded) and (record := self._store.record(encoded.manifest)) is not None:
                self._report_stored(record, tuple(range(len(record.manifest.rows))))

        self._spawn(encode(), ObjectFailed(effect.object_id, "bug"))

    def _sign_anew(self) -> None:
        """The clock may have been set back, or was ahead when an earlier run signed: see to it once a second."""

        async def sign() -> None:
            try:
                for record in await self._encoder.sign_anew():
                    self._report_stored(record, tuple(range(len(record.manifest.rows))))
            except Refused as refused:
                self._metrics.failures_total.labels("l2", refused.reason).inc()
            if not self._closed:
                self._signing = self._loop.call_later(SIGN_ANEW_S, self._sign_anew)

        self._tasks.spawn(sign())
