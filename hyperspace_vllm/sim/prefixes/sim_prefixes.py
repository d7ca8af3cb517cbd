"""L2 of a simulated node: the real core, with effects performed against the simulated links, stores and clock.

It does what the daemon's driver does, and no more: nothing here decides.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol, assert_never

from ...core.events.conduct import ChargePeer, PeerMisbehaved
from ...core.events.known_peers import KvPeersChanged
from ...core.events.prefix_reading import (
    AnswerPrefix,
    EndLookup,
    FetchManifest,
    FetchRow,
    FindRowHolders,
    FindRows,
    LoadRow,
    PrefixReleased,
    ReleaseRows,
    RowFailed,
    RowReady,
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
from ...core.events.vocabulary import Effect, NetworkEvent, PrefixEffect, PrefixEvent
from ...core.node.node import Node
from ...core.peers.standing import Delivered
from ...core.peers.trust import Trust
from ...core.records.ids import ManifestDigest, PeerId, RowKey, row_id, sha256
from ...core.records.now import Now
from ...core.records.reason import Reason
from ..liars import Liar
from ..setting import Setting
from .kv_fleet import KvFleet
from .kv_liars import BOAST_EVERY_MS, LIES, NO_COMMITMENT, KvLiar
from .kv_load import (
    ARENA_ROWS,
    COMMIT_MS,
    ENCODE_ROW_MS,
    LOAD_MS,
    WRITE_MS,
)
from .sim_arena import UNSTORED, SimArena
from .sim_assembly import SimAssembly
from .sim_chunk_server import SimChunkServer
from .sim_engine import SimEngine
from .sim_objects import ALL_COLUMNS, SimDisk, SimObject
from .sim_peer_calls import SimPeerCalls


class PrefixesHost(Protocol):
    """The node whose L2 this is (SimHost)."""

    @property
    def number(self) -> int: ...
    @property
    def public_key(self) -> bytes: ...
    @property
    def now(self) -> Now: ...
    @property
    def wall_ms(self) -> int: ...
    @property
    def trust(self) -> Trust: ...
    @property
    def core(self) -> Node: ...
    @property
    def liar(self) -> Liar | None: ...
    def tell(self, event: NetworkEvent) -> None: ...
    def perform_all(self, effects: list[Effect]) -> None: ...
    def later(self, delay_ms: float, act: Callable[[], None]) -> None: ...


class SimPrefixes:
    """Of one host; `engine` is what asks it for prefixes and computes them."""

    def __init__(self, setting: Setting, kv: KvFleet, host: PrefixesHost) -> None:
        self._setting = setting
        self._kv = kv
        self._host = host
        self.number = host.number
        self._rng = random.Random(f"{setting.seed}/kv/{host.number}")
        lie = LIES.get(host.liar.kind) if host.liar is not None else None
        self._liar = KvLiar(lie, host.public_key, self._rng, kv.objects, host.tell) if lie is not None else None
        self.disk = SimDisk()
        self.engine = SimEngine(setting, kv, self)
        self._encoded = 0

    def boot(self) -> None:
        """Start, with what is on the disk."""
        host, kv = self._host, self._kv
        self.arena = SimArena(ARENA_ROWS)
        self.engine.restart()
        self.calls = SimPeerCalls(self._setting, kv, host.trust, self)
        self.assembly = SimAssembly(self, self.calls, self.arena)
        self.server = kv.servers[self.number] = SimChunkServer(self._setting.network, kv.bulk, self.disk, self._liar)
        kv.bulk.booted(self.number)
        self._queue: deque[PrefixEvent] = deque()
        self._handling = False
        self._writing: dict[ManifestDigest, dict[int, int]] = {}
        self._encoder_free_ms = 0.0
        self.staged: dict[int, str] = {}  # slabs that workers have filled
        self.later(0, self._report_all)
        if self._liar is not None:
            self.later(BOAST_EVERY_MS, self._boast)

    def died(self, politely: bool, keep_disk: bool) -> None:
        """The process has ended."""
        self._kv.bulk.died(self.number, politely)
        self._kv.truth.died(self.number)
        if not keep_disk:
            self.disk = SimDisk()

    def set_peers(self, changed: KvPeersChanged) -> None:
        """The peers that are served KV, and those that may be asked for it."""
        number_of = self._kv.hosts.number_of
        self.server.admitted = frozenset(map(number_of, changed.admitted))
        own = {number_of(each.peer) for each in changed.endpoints if each.own}
        self._kv.bulk.meet(self.number, frozenset(own - {-1}))

    def overhear(self, topic: str, payload: bytes) -> None:
        """Gossip comes by a liar."""
        if self._liar is not None:
            self._liar.overhear(topic, payload)

    @property
    def now(self) -> Now:
        """This moment, by the host's clocks."""
        return self._host.now

    @property
    def now_ms(self) -> int:
        """Virtual time."""
        return self._setting.agenda.now_ms

    def later(self, delay_ms: float, act: Callable[[], None]) -> None:
        """In this life of the host, not while it is frozen."""
        self._host.later(delay_ms, act)

    def submit(self, event: PrefixEvent) -> None:
        """Let the core handle an event and perform what it decides, before anything else happens."""
        self._queue.append(event)
        if self._handling:
            return
        self._handling = True
        while self._queue:
            self._handle(self._queue.popleft())
        self._handling = False

    def _handle(self, event: PrefixEvent) -> None:
        self._setting.trace.add(self.now_ms, self.number, _in_order(event))
        for effect in self._host.core.handle(event, self._host.now):
            if isinstance(effect, ChargePeer):  # slow peers are charged too, which only the checker of L2 expects
                self.perform(effect)
            else:
                self._host.perform_all([effect])
        self._host.perform_all([])

    # --- performing effects ---------------------------------------------------------------------

    def perform(self, effect: PrefixEffect) -> None:
        """Do what the core has decided about prefixes."""
        match effect:
            case FindRows():
                self._find_rows(effect)
            case LoadRow():
                self._load(effect)
            case ReleaseRows(lookup, row_keys):
                self.assembly.end_some(lookup, row_keys)
                self.arena.end_some(lookup, row_keys)
            case FindRowHolders():
                self._kv.checker.on_find(self, effect)
                for peer in effect.peers:
                    self.calls.find(effect, peer)
            case FetchManifest():
                self.calls.fetch_manifest(effect)
            case FetchRow():
                self._fetch_row(effect)
            case EndLookup(lookup):
                self._end_lookup(lookup)
            case AnswerPrefix():
                self._answer(effect)
            case ChargePeer(peer, reason):
                self.charge(peer, reason)
            case KeepRow(staged, row_key):
                if self.staged.pop(staged, None) is not None:
                    self.arena.keep(row_key, row_key)
                    self.arena.lease(row_key, UNSTORED)
            case UnpinRows(row_keys):
                self.arena.end_some(UNSTORED, row_keys)
            case DropStaged(staged):
                if self.staged.pop(staged, None) is not None:
                    self.arena.free()
            case EncodeObject():
                self._encode(effect)
            case _:
                assert_never(effect)

    def _end_lookup(self, lookup: int, keep: frozenset[RowKey] = frozenset()) -> None:
        self.calls.end(lookup)
        self.assembly.end(lookup)
        self.arena.end_all(lookup, keep)

    # --- reading --------------------------------------------------------------------------------

    def _find_rows(self, effect: FindRows) -> None:
        in_memory = frozenset(key for key in effect.row_keys if key in self.arena)
        on_disk = frozenset(key for key in effect.row_keys if key not in in_memory and self._on_disk(key))
        leased = frozenset(filter(self.arena.is_leased, in_memory))
        self.submit(RowsFound(effect.lookup, in_memory, on_disk, leased, self.arena.room_bytes))

    def _on_disk(self, key: RowKey) -> tuple[SimObject, int] | None:
        return self.disk.find(row_id(self._setting.network_id, key))

    def _load(self, effect: LoadRow) -> None:
        if self.arena.lease(effect.row_key, effect.lookup):
            self.submit(RowReady(effect.lookup, effect.row_key))
            return
        found = self._on_disk(effect.row_key)
        if found is None or not self.arena.allocate():
            self.submit(RowFailed(effect.lookup, effect.row_key, "evicted" if found is None else "arena_full"))
            return
        self.calls.begin(effect.lookup)
        self.later(LOAD_MS, partial(self._loaded, effect, *found))

    def _loaded(self, effect: LoadRow, stored: SimObject, row: int) -> None:
        if not self.calls.runs(effect.lookup):
            self.arena.free()
            return
        self.arena.keep(effect.row_key, stored.holds[row])
        self.arena.lease(effect.row_key, effect.lookup)
        self.submit(RowReady(effect.lookup, effect.row_key))

    def _fetch_row(self, effect: FetchRow) -> None:
        self.engine.asked(effect.lookup, self._kv.hosts.number_of(effect.peer))
        stored = self.calls.known(effect.manifest)
        if stored is None:
            self.submit(RowFailed(effect.lookup, effect.row_key, "condemned"))
            return
        self.calls.begin(effect.lookup)
        self.assembly.fetch(effect, stored)
        self._kv.checker.on_fetch(self, effect)

    def keep(self, stored: SimObject, row: int, columns: int) -> None:
        """A row has come: write its chunks to the disk, and say so."""
        if stored.digest not in self._writing:
            self.later(WRITE_MS, partial(self._written, stored))
        self._writing.setdefault(stored.digest, {})[row] = columns

    def _written(self, stored: SimObject) -> None:
        rows = self._writing.pop(stored.digest)
        for row, columns in rows.items():
            self.disk.put(stored, row, columns)
        self._report_stored(stored, rows)

    def credit(self, fact: Delivered) -> None:
        """A peer has delivered."""
        self._host.trust.standings.note(fact, self._host.now)

    def _answer(self, effect: AnswerPrefix) -> None:
        keys = frozenset(key for _, _, _, key in effect.rows)
        self._kv.checker.on_answer(self, effect, self.engine.lookup(effect.lookup))
        from_peers = len(keys & self.assembly.opened(effect.lookup))
        self._end_lookup(effect.lookup, keys)
        if not effect.end_segment:
            self.submit(PrefixReleased(effect.lookup))
        self.engine.answered(effect, from_peers)

    # --- writing --------------------------------------------------------------------------------

    def _encode(self, effect: EncodeObject) -> None:
        if not all(key in self.arena for key in effect.row_keys):
            self.submit(ObjectFailed(effect.object_id, "evicted"))
            return
        self._encoder_free_ms = max(self._encoder_free_ms, self.now_ms)
        self._encoder_free_ms += len(effect.row_keys) * ENCODE_ROW_MS + COMMIT_MS
        holder = f"object {effect.object_id}"
        for key in effect.row_keys:
            self.arena.lease(key, holder)
        self.later(self._encoder_free_ms - self.now_ms, partial(self._stored, effect, holder))

    def _stored(self, effect: EncodeObject, holder: str) -> None:
        self.arena.end_some(holder, effect.row_keys)
        self._encoded += 1
        row_ids = tuple(row_id(self._setting.network_id, key) for key in effect.row_keys)
        digest = ManifestDigest(sha256(self._host.public_key, self._encoded.to_bytes(8, "big"), *row_ids))
        fingerprint, key = effect.layout.fingerprint, self._host.public_key
        stored = SimObject(digest, key, fingerprint, row_ids, effect.row_keys, effect.length, effect.shareable)
        self._kv.objects[digest] = stored
        for row in range(len(row_ids)):
            self.disk.put(stored, row, ALL_COLUMNS)
        self.submit(ObjectEncoded(effect.object_id, digest))
        self._report_stored(stored, tuple(range(len(row_ids))))

    def _report_all(self) -> None:
        """Everything that an earlier life left on the disk."""
        for stored, rows in self.disk.shareable():
            self._report_stored(stored, rows)

    def _report_stored(self, stored: SimObject, rows: Iterable[int]) -> None:
        row_ids = tuple(stored.row_ids[row] for row in rows)
        if not row_ids:
            return
        if stored.shareable:
            self._kv.truth.announced(self.number, row_ids)
        self._host.tell(RowsStored(stored.digest, stored.fingerprint, NO_COMMITMENT, row_ids, stored.shareable))

    # --- leaves ---------------------------------------------------------------------------------

    def charge(self, peer: PeerId, reason: Reason) -> None:
        """A peer lied, broke the protocol or was slow."""
        self._kv.checker.on_charge(self, peer, reason)
        if reason is Reason.PROTOCOL:
            self._host.tell(PeerMisbehaved(peer))

    def _boast(self) -> None:
        assert self._liar is not None
        self._liar.boast()
        self.later(BOAST_EVERY_MS, self._boast)


def _in_order(event: PrefixEvent) -> object:
    """The event, with a repr that is the same in every process: sets have no order."""
    if isinstance(event, RowsFound):
        return "RowsFound", event.lookup, sorted(event.in_memory), sorted(event.on_disk), event.room_bytes
    return event
