"""Several nodes on one virtual clock: the real core, with a network and stores that only keep count.

Everything that varies is drawn from one seeded generator, so that a run is repeated exactly by its seed. Nothing here
decides: a world performs effects the way the daemon does, and misbehaves where a `Host` says so.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from nacl.signing import SigningKey

from ..core.events.conduct import ChargePeer
from ..core.events.node_state import Tick
from ..core.events.prefix_reading import (
    AnswerPrefix,
    ChunksVerified,
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
    RowReady,
    RowsFound,
)
from ..core.events.prefix_writing import (
    DropStaged,
    EncodeObject,
    KeepRow,
    ObjectEncoded,
    ObjectFailed,
    RequestOver,
    RowArrived,
    SegmentKeyKnown,
    UnpinRows,
)
from ..core.events.vocabulary import Effect, Event
from ..core.node.node import Node
from ..core.node.node_options import NodeOptions
from ..core.peers.dials import Dials
from ..core.peers.trust import Trust
from ..core.prefix.fetch import FetchMode
from ..core.records.ids import ManifestDigest, NetworkId, PeerId, RowId, RowKey, SegmentKey, peer_id, row_id, sha256
from ..core.records.layout import Layout
from ..core.records.limits import DATA_CHUNKS, TOTAL_CHUNKS
from ..core.records.manifest import chunk_bytes_for
from ..core.records.now import Now
from ..core.records.reason import Reason

ALL_COLUMNS = (1 << TOTAL_CHUNKS) - 1
ROOM_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a manifest says, and which of its columns are really there."""

    fingerprint: bytes
    row_ids: tuple[RowId, ...]
    row_lengths: tuple[int, ...]


@dataclass(slots=True)
class TimedAnswer:
    """One AnswerPrefix and when it was given."""

    at_ms: int
    effect: AnswerPrefix


@dataclass(slots=True)
class Host:
    """A node, its stores and its faults. Columns in `lost` are offered, and answered `not_here`."""

    peer: PeerId
    node: Node
    latency_ms: int = 1
    bytes_per_ms: int = 100_000
    frozen: bool = False
    lost: int = 0  # columns that it no longer has
    withheld: int = 0  # columns that it never sends, nor says so
    garbage: bool = False  # its chunks fail their digests
    forged: bool = False  # its manifests fail verification
    boastful: bool = False  # offers rows that aren't in the manifest it names
    disk_full: bool = False
    arena_rows: int = 1 << 30
    memory: set[RowKey] = field(default_factory=set)
    disk: set[RowKey] = field(default_factory=set)
    objects: dict[ManifestDigest, StoredObject] = field(default_factory=dict)
    served: dict[RowId, tuple[ManifestDigest, int]] = field(default_factory=dict)
    columns: dict[RowId, int] = field(default_factory=dict)  # of rows that were fetched; of own ones all
    staged: dict[int, int] = field(default_factory=dict)  # slab -> how often it was disposed of
    answers: dict[int, list[TimedAnswer]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    charged: list[tuple[PeerId, Reason]] = field(default_factory=list)
    arrived: dict[tuple[int, RowKey, ManifestDigest], int] = field(default_factory=dict)
    ready: set[tuple[int, RowKey]] = field(default_factory=set)
    uplink_free_ms: float = 0
    events: int = 0
    tick_at_ms: int | None = None


class World:
    """Add hosts, want and publish prefixes, `run`. Times are virtual milliseconds."""

    def __init__(self, seed: int, network: NetworkId) -> None:
        self.rng = random.Random(seed)
        self.network = network
        self.now_ms = 0
        self.hosts: dict[PeerId, Host] = {}
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._next_id = 1

    def add(self, name: str, peers: tuple[str, ...], fetch: FetchMode = "auto") -> Host:
        """A host called `name` that trusts `peers`."""
        me, others = _key_of(name), tuple(_key_of(peer).verify_key.encode() for peer in peers)
        trust = Trust("members", me.verify_key.encode(), frozenset(others), frozenset(), None)
        options = NodeOptions(self.network, kv_peers=tuple(map(peer_id, others)), fetch=fetch)
        node = Node(options, me, trust, Dials(self.now), random.Random(self.rng.random()))
        peer = peer_id(me.verify_key.encode())
        host = self.hosts[peer] = Host(peer, node)
        return host

    @property
    def now(self) -> Now:
        """This moment; nothing of prefixes bears a date."""
        return Now(self.now_ms, 0)

    def at(self, delay_ms: float, act: Callable[[], None]) -> None:
        """Do something later."""
        self._order += 1
        heapq.heappush(self._agenda, (self.now_ms + round(delay_ms), self._order, act))

    def run(self, until_ms: int) -> None:
        """Let time pass until `until_ms`."""
        while self._agenda and self._agenda[0][0] <= until_ms:
            self.now_ms, _, act = heapq.heappop(self._agenda)
            act()
        self.now_ms = until_ms

    def want(
        self,
        host: Host,
        layout: Layout,
        keys: tuple[SegmentKey, ...],
        prefill_ms: int = 4000,
        deadline_ms: int = 10_000,
        start_token: int = 0,
        may_ask_peers: bool = True,
    ) -> int:
        """A scheduler of `host` looks up a prefix; returns the lookup's number."""
        lookup = self._number()
        host.answers[lookup] = []
        self.tell(
            host,
            PrefixWanted(lookup, layout, keys, start_token, prefill_ms, deadline_ms, may_ask_peers),
        )
        return lookup

    def publish(self, host: Host, layout: Layout, keys: tuple[SegmentKey, ...], shareable: bool = True) -> None:
        """A request of `host` computed the segments `keys`: stage, name, end, in any order that may happen."""
        request = f"r{self._number()}"
        for segment, key in enumerate(keys):
            named = SegmentKeyKnown("engine", request, segment, key, layout, shareable)
            self.at(self.rng.randint(0, 5), partial(self.tell, host, named))
            for part in range(len(layout.parts)):
                for rank in range(layout.ranks):
                    staged = self._number()
                    host.staged[staged] = 0
                    length = layout.parts[part].row_bytes
                    row = RowArrived("engine", request, segment, part, rank, staged, length, layout)
                    self.at(self.rng.randint(0, 5), partial(self.tell, host, row))
        self.at(10, partial(self.tell, host, RequestOver("engine", request)))

    def release(self, host: Host, lookup: int) -> None:
        """The client is done with a lookup."""
        self.tell(host, PrefixReleased(lookup))

    def tell(self, host: Host, event: Event) -> None:
        """Hand an event to a host's core and perform what it decides."""
        host.events += 1
        for effect in host.node.handle(event, self.now):
            self._perform(host, effect)
        self._arm(host)

    # --- performing effects ---------------------------------------------------------------------

    def _perform(self, host: Host, effect: Effect) -> None:
        match effect:
            case FindRows():
                keys = set(effect.row_keys)
                memory, disk = frozenset(keys & host.memory), frozenset(keys & host.disk)
                room_bytes = ROOM_BYTES if len(host.ready) < host.arena_rows else 0
                found = RowsFound(effect.lookup, memory, disk, memory, room_bytes)
                self.at(0, partial(self.tell, host, found))
            case LoadRow():
                self._load(host, effect)
            case ReleaseRows():
                released = {(effect.lookup, key) for key in effect.row_keys}
                host.ready -= released
                host.arrived = {at: columns for at, columns in host.arrived.items() if at[:2] not in released}
            case FindRowHolders():
                for peer in effect.peers:
                    self._ask_providers(host, self.hosts[peer], effect)
            case FetchManifest():
                self._fetch_manifest(host, self.hosts[effect.peer], effect)
            case FetchRow():
                self._fetch_row(host, self.hosts[effect.peer], effect)
            case AnswerPrefix():
                host.answers[effect.lookup].append(TimedAnswer(self.now_ms, effect))
                for _, _, _, key in effect.rows:
                    assert (effect.lookup, key) in host.ready, "answered a row that isn't ready"
            case EndLookup():
                host.ended.add(effect.lookup)
            case ChargePeer():
                host.charged.append((effect.peer, effect.reason))
            case KeepRow():
                host.staged[effect.staged] += 1
                host.memory.add(effect.row_key)
            case UnpinRows():
                pass  # nothing is evicted here
            case DropStaged():
                host.staged[effect.staged] += 1
            case EncodeObject():
                self.at(self.rng.randint(1, 20), partial(self._encode, host, effect))
            case _:
                raise TypeError(f"there is no network here: {effect}")

    def _load(self, host: Host, effect: LoadRow) -> None:
        if effect.row_key in host.memory:
            self._row_ready(host, effect.lookup, effect.row_key)
        elif effect.row_key in host.disk:
            act = partial(self._row_ready, host, effect.lookup, effect.row_key)
            self.at(self.rng.randint(1, 10), act)
        else:
            self._report(host, effect.lookup, RowFailed(effect.lookup, effect.row_key, "evicted"), 0)

    def _ask_providers(self, host: Host, peer: Host, effect: FindRowHolders) -> None:
        rtt_ms = self._rtt_ms(host, peer)
        if peer.frozen or rtt_ms > effect.timeout_ms:
            failed = ProviderFailed(effect.lookup, peer.peer, Reason.TIMEOUT)
            self._report(host, effect.lookup, failed, effect.timeout_ms)
            return
        offers = tuple(
            RowOffer(wanted, *peer.served[wanted], peer.columns.get(wanted, ALL_COLUMNS))
            for wanted in effect.row_ids
            if wanted in peer.served
        )
        if peer.boastful:
            some = next(iter(peer.objects), ManifestDigest(bytes(32)))
            offers = tuple(RowOffer(wanted, some, 0, ALL_COLUMNS) for wanted in effect.row_ids)
        self._report(host, effect.lookup, ProviderAnswered(effect.lookup, peer.peer, offers, rtt_ms), rtt_ms)

    def _fetch_manifest(self, host: Host, peer: Host, effect: FetchManifest) -> None:
        def refuse(reason: Reason, delay_ms: int) -> None:
            refused = ManifestRefused(effect.lookup, peer.peer, effect.manifest, reason)
            self._report(host, effect.lookup, refused, delay_ms)

        stored = peer.objects.get(effect.manifest)
        rtt_ms = self._rtt_ms(host, peer)
        if peer.frozen:
            refuse(Reason.TIMEOUT, effect.timeout_ms)
        elif stored is None or peer.forged:
            refuse(Reason.FORGED if peer.forged else Reason.NOT_HERE, rtt_ms)
        else:
            verified = ManifestVerified(
                effect.lookup,
                peer.peer,
                effect.manifest,
                stored.fingerprint,
                stored.row_ids,
                stored.row_lengths,
                chunk_bytes_for(max(stored.row_lengths)),
            )
            self._report(host, effect.lookup, verified, rtt_ms + 5)

    def _fetch_row(self, host: Host, peer: Host, effect: FetchRow) -> None:
        """The peer sends the columns one after another over its one uplink; they arrive in up to two batches."""

        def stall(reason: Reason, delay_ms: float) -> None:
            stalled = HolderStalled(effect.lookup, effect.row_key, peer.peer, reason)
            self.at(delay_ms, partial(self._stalled, host, effect, stalled))

        stored = peer.objects.get(effect.manifest)
        rtt_ms = self._rtt_ms(host, peer)
        if peer.frozen:
            stall(Reason.TIMEOUT, effect.timeout_ms)
            return
        if stored is None or effect.row >= len(stored.row_ids):
            stall(Reason.NOT_HERE, rtt_ms)
            return
        if peer.garbage:
            stall(Reason.BAD_DIGEST, rtt_ms + 1)
            return
        chunk_ms = effect.length / DATA_CHUNKS / peer.bytes_per_ms
        lost = peer.lost | ALL_COLUMNS & ~peer.columns.get(stored.row_ids[effect.row], ALL_COLUMNS)
        sent = [c for c in range(TOTAL_CHUNKS) if effect.columns & ~lost & ~peer.withheld & 1 << c]
        starts_ms = max(peer.uplink_free_ms - self.now_ms, rtt_ms)
        for batch in (sent[: len(sent) // 2], sent[len(sent) // 2 :]):
            starts_ms += len(batch) * chunk_ms
            columns = sum(1 << c for c in batch)
            if columns:
                self.at(starts_ms, partial(self._arrive, host, peer, effect, columns))
        peer.uplink_free_ms = self.now_ms + starts_ms
        if effect.columns & lost:
            stall(Reason.NOT_HERE, starts_ms)
        elif effect.columns & peer.withheld:
            stall(Reason.TIMEOUT, effect.timeout_ms)

    def _arrive(self, host: Host, peer: Host, effect: FetchRow, columns: int) -> None:
        if peer.frozen or (effect.lookup, effect.row_key) in host.ready:
            return
        at = (effect.lookup, effect.row_key, effect.manifest)
        have = host.arrived[at] = host.arrived.get(at, 0) | columns
        if have.bit_count() < DATA_CHUNKS:
            verified = ChunksVerified(effect.lookup, effect.row_key, peer.peer, columns)
            self._report(host, effect.lookup, verified, 0)
        elif len(host.ready) >= host.arena_rows:
            self._report(host, effect.lookup, RowFailed(effect.lookup, effect.row_key, "arena_full"), 1)
        else:
            self._keep_fetched(host, peer.objects[effect.manifest], effect, have)
            self._row_ready(host, effect.lookup, effect.row_key)

    def _keep_fetched(self, host: Host, stored: StoredObject, effect: FetchRow, columns: int) -> None:
        """Who fetched a row serves the columns that came."""
        wanted = stored.row_ids[effect.row]
        host.memory.add(effect.row_key)
        host.disk.add(effect.row_key)
        host.objects.setdefault(effect.manifest, stored)
        if wanted not in host.served:
            host.served[wanted] = (effect.manifest, effect.row)
            host.columns[wanted] = columns

    def _stalled(self, host: Host, effect: FetchRow, stalled: HolderStalled) -> None:
        if (effect.lookup, effect.row_key) not in host.ready:
            self._report(host, effect.lookup, stalled, 0)

    def _row_ready(self, host: Host, lookup: int, key: RowKey) -> None:
        host.ready.add((lookup, key))
        self._report(host, lookup, RowReady(lookup, key), 0)

    def _encode(self, host: Host, effect: EncodeObject) -> None:
        if host.disk_full:
            self.tell(host, ObjectFailed(effect.object_id, "disk_full"))
            return
        ids = tuple(row_id(self.network, key) for key in effect.row_keys)
        digest = ManifestDigest(sha256(host.peer.encode(), *ids))
        lengths = (effect.length,) * len(ids)
        host.objects[digest] = StoredObject(effect.layout.fingerprint, ids, lengths)
        host.disk.update(effect.row_keys)
        if effect.shareable:
            for row, wanted in enumerate(ids):
                host.served[wanted] = (digest, row)
                host.columns.pop(wanted, None)
        self.tell(host, ObjectEncoded(effect.object_id, digest))

    # --- leaves ---------------------------------------------------------------------------------

    def _report(self, host: Host, lookup: int, event: Event, delay_ms: float) -> None:
        """Tell the core what came of an effect, unless the lookup was ended meanwhile."""

        def act() -> None:
            if lookup not in host.ended:
                self.tell(host, event)

        self.at(delay_ms, act)

    def _rtt_ms(self, host: Host, peer: Host) -> int:
        return 2 * self.rng.randint(peer.latency_ms, peer.latency_ms + host.latency_ms + 1)

    def _arm(self, host: Host) -> None:
        """Keep one timer a host, as the driver does; one that was moved comes and goes."""
        due_ms = host.node.next_deadline_ms()
        if due_ms is not None and due_ms != host.tick_at_ms:
            self.at(max(due_ms - self.now_ms, 0), partial(self._tick, host, due_ms))
        host.tick_at_ms = due_ms

    def _tick(self, host: Host, due_ms: int) -> None:
        if host.tick_at_ms == due_ms:
            host.tick_at_ms = None
            self.tell(host, Tick())
            assert host.tick_at_ms is None or host.tick_at_ms > self.now_ms, "a tick must settle what is due"

    def _number(self) -> int:
        self._next_id += 1
        return self._next_id


def _key_of(name: str) -> SigningKey:
    return SigningKey(sha256(name.encode()))
