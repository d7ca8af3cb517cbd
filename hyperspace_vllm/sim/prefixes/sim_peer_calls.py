"""What a simulated host asks of its peers over the bulk transport: offers, manifests and chunks, judged as the daemon
judges them."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from ...core.events.prefix_reading import (
    FetchManifest,
    FetchRow,
    FindRowHolders,
    ManifestRefused,
    ManifestVerified,
    ProviderAnswered,
    ProviderFailed,
    RowOffer,
)
from ...core.events.vocabulary import PrefixEvent
from ...core.peers.standing import Failed
from ...core.peers.trust import Trust
from ...core.records.ids import ManifestDigest, PeerId, peer_id
from ...core.records.now import Now
from ...core.records.reason import Reason
from ..setting import Setting
from .kv_fleet import KvFleet
from .kv_load import CHUNK_BYTES, KZG_MS
from .sim_bulk import Call
from .sim_chunk_server import SimChunkServer
from .sim_engine import SimEngine
from .sim_objects import SimDisk, SimObject

ASK_BYTES = 64  # a request, and 32 more for each row that it names


class AskingNode(Protocol):
    """The node that asks (SimPrefixes)."""

    @property
    def number(self) -> int: ...
    @property
    def now(self) -> Now: ...
    @property
    def disk(self) -> SimDisk: ...
    @property
    def engine(self) -> SimEngine: ...
    def submit(self, event: PrefixEvent) -> None: ...
    def later(self, delay_ms: float, act: Callable[[], None]) -> None: ...
    def charge(self, peer: PeerId, reason: Reason) -> None: ...


class SimPeerCalls:
    """Of one life of a host."""

    def __init__(self, setting: Setting, kv: KvFleet, trust: Trust, node: AskingNode) -> None:
        self._agenda = setting.agenda
        self._kv = kv
        self._trust = trust
        self._node = node
        self._number = node.number
        self._engine = node.engine
        self._calls: dict[int, dict[Call, None]] = {}  # of each lookup that runs, for offers and manifests
        self._verified: dict[ManifestDigest, SimObject] = {}
        self._condemned: set[ManifestDigest] = set()

    def known(self, digest: ManifestDigest) -> SimObject | None:
        """A manifest that was verified before, unless it was condemned since."""
        return None if digest in self._condemned else self._verified.get(digest) or self._node.disk.get(digest)

    def begin(self, lookup: int) -> None:
        """From now on the lookup runs, until `end`."""
        self._calls.setdefault(lookup, {})

    def runs(self, lookup: int) -> bool:
        """Whether the lookup has not ended."""
        return lookup in self._calls

    def end(self, lookup: int) -> None:
        """Cancel what was asked for the lookup."""
        for call in self._calls.pop(lookup, {}):
            self._kv.bulk.end(call)

    def find(self, effect: FindRowHolders, peer: PeerId) -> None:
        """Ask a peer what it has of these rows."""
        lookup, asked_ms = effect.lookup, self._agenda.now_ms

        def answered(offers: tuple[RowOffer, ...] | Reason) -> None:
            self._end_own(lookup, call)
            if isinstance(offers, Reason):
                self._misbehaved(peer, offers)
                self._node.submit(ProviderFailed(lookup, peer, offers))
            else:
                self._engine.offered(lookup, offers)
                self._node.submit(ProviderAnswered(lookup, peer, offers, self._agenda.now_ms - asked_ms))

        def failed(reason: Reason) -> None:
            self._end_own(lookup, call)
            self._node.submit(ProviderFailed(lookup, peer, reason))

        def serve(call: Call) -> None:
            self._server(peer).find(effect.row_ids, answered, call)

        size = ASK_BYTES + 32 * len(effect.row_ids)
        call = self._call(lookup, peer, size, effect.timeout_ms, serve, failed)

    def fetch_manifest(self, effect: FetchManifest) -> None:
        """Have a manifest, and judge it as the daemon does."""
        lookup, peer = effect.lookup, effect.peer
        self._engine.asked(lookup, self._kv.hosts.number_of(peer))
        if effect.manifest in self._condemned:
            self._node.submit(ManifestRefused(lookup, peer, effect.manifest, Reason.CONDEMNED))
            return
        known = self._verified.get(effect.manifest) or self._node.disk.get(effect.manifest)
        if known is not None:
            self._check_tags(effect, known)
            return

        def failed(reason: Reason) -> None:
            self._end_own(lookup, call)
            self._node.submit(ManifestRefused(lookup, peer, effect.manifest, reason))

        def answered(stored: SimObject | Reason) -> None:
            if isinstance(stored, Reason):
                self._misbehaved(peer, stored)
                failed(stored)
            else:
                self._end_own(lookup, call)
                self._node.later(KZG_MS, partial(self._check_manifest, effect, stored))

        def serve(call: Call) -> None:
            self._server(peer).show(effect.manifest, answered, call)

        call = self._call(lookup, peer, ASK_BYTES, effect.timeout_ms, serve, failed)

    def _check_manifest(self, effect: FetchManifest, stored: SimObject) -> None:
        reason: Reason | None = None
        if stored.digest != effect.manifest:
            reason = Reason.FORGED
        elif not self._trust.trusts_kv(stored.producer, self._node.now):
            reason = Reason.UNTRUSTED_PRODUCER
        elif not stored.is_signed:
            reason = Reason.BAD_SIGNATURE
        if effect.lookup not in self._calls:
            return
        if reason is not None:
            self._node.submit(ManifestRefused(effect.lookup, effect.peer, effect.manifest, reason))
        else:
            self._verified[stored.digest] = stored
            self._check_tags(effect, stored)

    def _check_tags(self, effect: FetchManifest, stored: SimObject) -> None:
        """Of the rows that the lookup needs."""
        if not stored.has_true_tags and any(name in effect.row_keys for name in stored.row_ids):
            self._condemned.add(stored.digest)
            producer = peer_id(stored.producer)
            self._node.submit(ManifestRefused(effect.lookup, effect.peer, effect.manifest, Reason.BAD_TAG, producer))
            return
        lengths = (stored.length,) * len(stored.row_ids)
        self._node.submit(
            ManifestVerified(
                effect.lookup,
                effect.peer,
                effect.manifest,
                stored.fingerprint,
                stored.row_ids,
                lengths,
                CHUNK_BYTES,
            )
        )

    def ask_chunks(
        self, effect: FetchRow, arrived: Callable[[int, bool], None], lacking: Callable[[Reason], None]
    ) -> Call:
        """Ask a peer for columns of a row."""

        def serve(call: Call) -> None:
            self._server(effect.peer).send(effect.manifest, effect.row, effect.columns, arrived, lacking, call)

        target = self._kv.hosts.number_of(effect.peer)
        return self._kv.bulk.call(self._number, target, ASK_BYTES, effect.timeout_ms, serve, lacking)

    def end_call(self, call: Call) -> None:
        """It has brought what it could, or isn't wanted any more."""
        self._kv.bulk.end(call)

    # --- leaves ---------------------------------------------------------------------------------

    def _call(
        self,
        lookup: int,
        peer: PeerId,
        size: int,
        timeout_ms: int,
        serve: Callable[[Call], None],
        failed: Callable[[Reason], None],
    ) -> Call:
        target = self._kv.hosts.number_of(peer)
        call = self._kv.bulk.call(self._number, target, size, timeout_ms, serve, failed)
        self._calls.setdefault(lookup, {})[call] = None
        return call

    def _end_own(self, lookup: int, call: Call) -> None:
        self._kv.bulk.end(call)
        self._calls.get(lookup, {}).pop(call, None)

    def _server(self, peer: PeerId) -> SimChunkServer:
        return self._kv.servers[self._kv.hosts.number_of(peer)]

    def _misbehaved(self, peer: PeerId, reason: Reason) -> None:
        """What came is no message: the transport charges it, before the core hears of it."""
        if reason is Reason.PROTOCOL:
            self._trust.standings.note(Failed(peer, reason), self._node.now)
            self._node.charge(peer, reason)
