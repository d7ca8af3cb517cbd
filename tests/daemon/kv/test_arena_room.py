"""How much of a prefix fits: the machine of a lookup over a real arena, with disk and peers that answer when they like.

What fits is worked out the slow way beside it: an end fits when what it needs, page by page, is no more than what is
neither leased to others nor being written by them.
"""

import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.prefix_reading import (
    AnswerPrefix,
    FetchManifest,
    FetchRow,
    FindRowHolders,
    FindRows,
    LoadRow,
    ManifestVerified,
    PrefixWanted,
    ProviderAnswered,
    ReleaseRows,
    RowFailed,
    RowOffer,
    RowReady,
    RowsFound,
)
from hyperspace_vllm.core.events.vocabulary import PrefixEffect
from hyperspace_vllm.core.local.slab import PAGE_BYTES, Slab, pages_bytes
from hyperspace_vllm.core.prefix.cost_model import RateEstimator
from hyperspace_vllm.core.prefix.fetch import LookupEvent, PrefixLookup
from hyperspace_vllm.core.prefix.plan import Row, needed, rows_of
from hyperspace_vllm.core.records.ids import ManifestDigest, PeerId, RowKey, SegmentKey, network_id, row_key
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.manifest import chunk_bytes_for
from hyperspace_vllm.daemon.kv.arena import Arena
from hyperspace_vllm.daemon.kv.row_cache import RowCache

NETWORK = network_id("test")
PEER, MANIFEST = PeerId("A"), ManifestDigest(b"m" * 32)
SEGMENTS = 12
KEYS = tuple(SegmentKey(bytes([i]) * 32) for i in range(SEGMENTS))


class Bench:
    """One arena and its lookups, performed as the driver does."""

    def __init__(self, directory: Path, rng: random.Random, layout: Layout, pages: int) -> None:
        self.rng, self.layout = rng, layout
        self.cache = RowCache(Arena(directory / f"arena-{rng.random()}", (pages + 1) * PAGE_BYTES))
        self.rows = rows_of(NETWORK, layout, KEYS, 0)
        self.disk: set[RowKey] = set()
        self.remote: set[RowKey] = set()
        self.lookups: dict[int, PrefixLookup] = {}
        self.answers: dict[int, AnswerPrefix] = {}
        self.fetching: dict[tuple[int, RowKey], Slab] = {}
        self.now_ms = 0
        self.pinned = 0  # slabs of others that stay
        self._soon: deque[tuple[int, LookupEvent]] = deque()
        self._later: list[tuple[int, LookupEvent]] = []  # in no order

    def want(self, number: int, start_token: int = 0) -> None:
        wanted = PrefixWanted(number, self.layout, KEYS, start_token, 0, 10_000, True)
        lookup = PrefixLookup(wanted, NETWORK, (PEER,), "always", RateEstimator(), self.now_ms)
        self.lookups[number] = lookup
        self._perform(lookup.start(self.now_ms))
        self._settle()

    def run(self) -> None:
        """Until every lookup is answered; time passes where nothing else happens."""
        while len(self.answers) < len(self.lookups):
            self.step()

    def step(self) -> None:
        if self._later:
            self._soon.append(self._later.pop(self.rng.randrange(len(self._later))))
        else:
            open_lookups = [lookup for lookup in self.lookups.values() if not lookup.answered]
            due_ms = [lookup.next_deadline_ms() for lookup in open_lookups]
            self.now_ms = min(due for due in due_ms if due is not None)
            for lookup in open_lookups:
                self._perform(lookup.handle(Tick(), self.now_ms))
        self._settle()

    def release(self, number: int) -> None:
        self.cache.end_leases(number)

    def _settle(self) -> None:
        while self._soon:
            number, event = self._soon.popleft()
            if isinstance(event, RowReady):
                if (slab := self.fetching.pop((number, event.row_key), None)) is not None:
                    self.cache.keep(event.row_key, slab)
                elif event.row_key not in self.cache:
                    continue  # cancelled while it was under way
                self.cache.lease(event.row_key, number)
            self._perform(self.lookups[number].handle(event, self.now_ms))

    def _perform(self, effects: list[PrefixEffect]) -> None:
        for effect in effects:
            number = effect.lookup  # type: ignore[union-attr]
            match effect:
                case FindRows():
                    memory = frozenset(key for key in effect.row_keys if key in self.cache)
                    leased = frozenset(filter(self.cache.is_leased, memory))
                    disk = frozenset(self.disk) - memory
                    self._soon.append((number, RowsFound(number, memory, disk, leased, self.cache.room_bytes)))
                case LoadRow(_, key):
                    if self.cache.lease(key, number) is not None:
                        self._soon.append((number, RowReady(number, key)))
                    elif key not in self.disk:
                        self._soon.append((number, RowFailed(number, key, "evicted")))
                    else:
                        self._take_slab(number, key)
                case FetchRow():
                    if (number, effect.row_key) not in self.fetching:
                        self._take_slab(number, effect.row_key)
                case ReleaseRows(_, keys):
                    for key in keys:
                        self._cancel(number, key)
                    self.cache.end_some(number, keys)
                case FindRowHolders():
                    offers = [
                        RowOffer(row.id, manifest, place, (1 << 64) - 1)
                        for manifest, rows in self._offered().items()
                        for place, row in enumerate(rows)
                    ]
                    self._later.append((number, ProviderAnswered(number, PEER, tuple(offers), 1)))
                case FetchManifest():
                    rows = self._offered()[effect.manifest]
                    ids, lengths = tuple(row.id for row in rows), tuple(row.length for row in rows)
                    verified = ManifestVerified(
                        number,
                        PEER,
                        effect.manifest,
                        self.layout.fingerprint,
                        ids,
                        lengths,
                        chunk_bytes_for(lengths[0]),
                    )
                    self._later.append((number, verified))
                case AnswerPrefix():
                    self.answers[number] = effect
                    for key in [key for lookup, key in self.fetching if lookup == number]:
                        self._cancel(number, key)
                    held = frozenset(key for *_, key in effect.rows)
                    assert all(self.cache.is_leased(key) for key in held)
                    self.cache.end_leases(number, held)
                case _:
                    raise AssertionError(effect)

    def _offered(self) -> dict[ManifestDigest, list[Row]]:
        """The peer's rows, those of one length under one manifest."""
        offered: dict[ManifestDigest, list[Row]] = {}
        for key, row in self.rows.items():
            if key in self.remote:
                offered.setdefault(ManifestDigest(row.length.to_bytes(32, "big")), []).append(row)
        return offered

    def _take_slab(self, number: int, key: RowKey) -> None:
        slab = self.cache.allocate(self.rows[key].length)
        if slab is None:
            self._soon.append((number, RowFailed(number, key, "arena_full")))
            return
        self.fetching[number, key] = slab
        self._later.append((number, RowReady(number, key)))

    def _cancel(self, number: int, key: RowKey) -> None:
        if (slab := self.fetching.pop((number, key), None)) is not None:
            self.cache.free(slab)
            self._later = [e for e in self._later if e != (number, RowReady(number, key))]

    # --- what fits, the slow way ----------------------------------------------------------------

    def longest(self, start_token: int, room: int) -> int:
        """The most segments whose rows are all to be had and fit into `room` bytes."""
        best = 0
        for end in range(start_token // 256 + 1, SEGMENTS + 1):
            places = needed(self.layout, start_token, end)
            ranks = range(self.layout.ranks)
            keys = [row_key(KEYS[segment], part, rank) for segment, part in places for rank in ranks]
            there = all(key in self.cache or key in self.disk or key in self.remote for key in keys)
            cost = sum(pages_bytes(self.rows[k].length) for k in keys if not self.cache.is_leased(k))
            if there and cost <= room:
                best = end
        return best


def layouts(rng: random.Random, equal: bool) -> Layout:
    """Up to three attention reaches on up to two ranks; rows of equally many pages, or of one to four each."""
    windows = [0, *rng.sample((256, 512, 600, 1000), rng.randint(0, 2))] if rng.random() < 0.8 else [512]
    pages = [2] * len(windows) if equal else [rng.randint(1, 4) for _ in windows]
    parts = tuple(Part(w, n * PAGE_BYTES - rng.randint(0, 100)) for w, n in zip(windows, pages, strict=True))
    return Layout(bytes(32), 256, parts, rng.randint(1, 2))


def filled(bench: Bench) -> None:
    """Rows somewhere: in memory (leased to others or not, on the disk too or not), on the disk, at the peer, nowhere.

    Beside them rows of other prompts, leased or not, and slabs that workers are writing.
    """
    rng, pages = bench.rng, max(part.row_bytes for part in bench.layout.parts)
    rates = [rng.random() for _ in range(3)]
    for key, row in bench.rows.items():
        if rng.random() < rates[0]:
            bench.disk.add(key)
        if rng.random() < rates[1]:
            bench.remote.add(key)
        if rng.random() < rates[2] / 2 and (slab := bench.cache.allocate(row.length)) is not None:
            bench.cache.keep(key, slab)
            if rng.random() < 0.3:
                bench.cache.lease(key, "others")
                bench.pinned += 1
    for number in range(rng.randint(0, 12)):
        slab = bench.cache.allocate(pages)
        if slab is None:
            continue
        stays = rng.random() < 0.7
        bench.pinned += stays
        if not stays or rng.random() < 0.4:
            bench.cache.keep(RowKey(bytes([200 + number]) * 32), slab)
        if stays and RowKey(bytes([200 + number]) * 32) in bench.cache:
            bench.cache.lease(RowKey(bytes([200 + number]) * 32), "others")
    if rng.random() < 0.5:
        bench.remote |= bench.rows.keys()


def benches(directory: Path, equal: bool, count: int) -> Iterator[Bench]:
    for seed in range(count):
        rng = random.Random(seed)
        layout = layouts(rng, equal)
        slots = rng.randint(1, 3 * SEGMENTS)
        bench = Bench(directory, rng, layout, 2 * slots if equal else max(4, rng.randint(1, 80)))
        filled(bench)
        yield bench
        bench.cache.arena.close()


def test_the_answer_is_the_longest_prefix_that_fits_beside_what_others_lease(tmp_path: Path) -> None:
    cut = 0
    for bench in benches(tmp_path, equal=True, count=600):
        start_token = bench.rng.choice((0, 0, 256, 700))
        room = bench.cache.room_bytes
        expected, all_of_it = bench.longest(start_token, room), bench.longest(start_token, 1 << 62)
        bench.want(1, start_token)
        bench.run()
        assert bench.answers[1].end_segment == expected
        cut += 0 < expected < all_of_it
        bench.release(1)
        bench.cache.end_leases("others")
    assert cut > 50


def test_rows_of_several_sizes_lose_no_more_than_the_gaps_between_slabs_that_stay(tmp_path: Path) -> None:
    """A gap may be too small for the next row: with rows of up to four pages at worst three pages of each gap.

    The prompt's own rows lie where they are, too, and the last row is lost as a whole.
    """
    exact = below = 0
    for bench in benches(tmp_path, equal=False, count=600):
        room = bench.cache.room_bytes
        gaps = 1 + bench.pinned + sum(key in bench.cache for key in bench.rows)
        least = bench.longest(0, max(room - 3 * gaps * PAGE_BYTES, 0))
        most = bench.longest(0, room)
        bench.want(1)
        bench.run()
        assert least <= bench.answers[1].end_segment <= most
        exact += bench.answers[1].end_segment == most
        below += bench.answers[1].end_segment < most
    assert exact > 10 * below


def test_several_lookups_at_once_all_get_something_where_something_fits(tmp_path: Path) -> None:
    """Each lets go once it is answered, as an engine does when it has copied; none waits for longer than a moment."""
    for seed in range(200):
        rng = random.Random(seed)
        bench = Bench(tmp_path, rng, Layout(bytes(32), 256, (Part(0, 2 * PAGE_BYTES),), 1), rng.randint(4, 20))
        (bench.disk if rng.random() < 0.5 else bench.remote).update(bench.rows)
        lookups = range(1, rng.randint(2, 6))
        for number in lookups:
            bench.want(number)
        while len(bench.answers) < len(lookups):
            answered = set(bench.answers)
            bench.step()
            for number in bench.answers.keys() - answered:
                bench.release(number)
        assert all(answer.end_segment for answer in bench.answers.values())
        assert bench.cache.room_bytes == bench.cache.arena.capacity_bytes
        bench.cache.arena.close()
