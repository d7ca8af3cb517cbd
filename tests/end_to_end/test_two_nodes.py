"""Two nodes over real sockets: B gets A's rows byte for byte, and every fault ends in a prompt miss."""

import asyncio
import dataclasses
import signal
import sys
import threading
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import pytest_asyncio
from nacl.signing import SigningKey

from hyperspace_vllm.core.prefix import fetch, transfers
from hyperspace_vllm.core.records.ids import ManifestDigest, RowId, RowKey, row_id, row_key, sha256
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import TOTAL_CHUNKS, KiB, MiB
from hyperspace_vllm.core.records.manifest import Manifest, digest_blob
from hyperspace_vllm.core.records.wire import Offer
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.kv.chunk_store import ChunkStore
from hyperspace_vllm.daemon.kv.object_codec import ObjectRecord, chunk_digest, sign_record
from tests.support.nodes import NETWORK, Answer, SharedPool, TestNode, keys, peer_of, until
from tests.support.paths import ROOT
from tests.support.peer_process import layout_of

pytestmark = [pytest.mark.io, pytest.mark.asyncio(loop_scope="module")]

KEYS = keys("document", 3)
NETWORK_KEY = sha256(b"network key")
ROWS_STORED = 3 * 2 * 2  # segments x parts x ranks
ROWS_NEEDED = 3 * 2 + 2 * 2  # all of the full part, the last two segments of the window part
# The core's tests check the stall limit of 250 ms on a simulated clock. Here the clock is that of a machine that may be
# busy, so peers have 2 s, and a fault must not cost the lookup's 20 s.
STALL_MS, FAULT_S = 2_000, 8.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[SharedPool]:
    async with SharedPool.started() as pool:
        yield pool


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fetch, transfers):
        monkeypatch.setattr(module, "FETCH_STALL_MS", STALL_MS)


class Pair:
    """Producer A and fetcher B, created on first use."""

    def __init__(self, directory: Path, pool: SharedPool) -> None:
        self.directory = directory
        self.pool = pool
        self.nodes = AsyncExitStack()
        self.b_identity = Identity.load(self._at("b"))

    async def start(
        self,
        store: Callable[[Path, int], ChunkStore] = ChunkStore,
        arena_bytes: int = 64 * MiB,
        shareable: bool = True,
        b_disk_bytes: int = 64 * MiB,
    ) -> "tuple[TestNode, TestNode]":
        """A has the document on its disk, B is connected to A."""
        a = self.node("a", (peer_of(self.b_identity),), store=store)
        a.stage(KEYS, shareable=shareable)
        await until(lambda: a.store.rows == ROWS_STORED)
        b = self.node("b", (a.address,), arena_bytes=arena_bytes, disk_bytes=b_disk_bytes)
        await until(lambda: b.transport.is_connected(a.identity.peer_id))
        return a, b

    def node(self, name: str, peers: tuple[str, ...], **options: object) -> TestNode:
        node = TestNode(self._at(name), peers, compute=self.pool, **options)  # type: ignore[arg-type]
        self.nodes.push_async_callback(self._end, node)
        return node

    async def stop(self, node: TestNode) -> None:
        node.stopped = True
        await node.close()

    async def _end(self, node: TestNode) -> None:
        assert "bug" not in node.failures()
        if not node.stopped:
            await self.stop(node)

    def _at(self, name: str) -> Path:
        (self.directory / name).mkdir(exist_ok=True)
        return self.directory / name


@pytest_asyncio.fixture(loop_scope="module")
async def pair(tmp_path: Path, pool: SharedPool) -> AsyncIterator[Pair]:
    pair = Pair(tmp_path, pool)
    async with pair.nodes:
        yield pair


class Tampered(ChunkStore):
    """A store that lies to peers: about chunks, about records, or consistently, under another digest."""

    def __init__(self, directory: Path, quota_bytes: int) -> None:
        super().__init__(directory, quota_bytes)
        self.lost: frozenset[int] = frozenset()
        self.admits = True
        self.on_chunk: Callable[[int, bytearray], None] | None = None
        self.on_record: Callable[[ObjectRecord], ObjectRecord] | None = None
        self.rewritten: dict[ManifestDigest, ObjectRecord] = {}
        self.originals: dict[ManifestDigest, ManifestDigest] = {}
        self.stall_after: int | None = None
        self.stalled_at = 0.0
        self.go_on = threading.Event()

    def rewrite(self, change: Callable[[ObjectRecord], ObjectRecord]) -> None:
        """Offer changed objects under digests that match them."""
        for digest in list(self._objects):
            record = super().record(digest)
            assert record is not None
            changed = change(record)
            self.rewritten[changed.digest] = changed
            self.originals[changed.digest] = digest

    def offers(self, row_ids: Sequence[bytes]) -> tuple[Offer, ...]:
        fakes = {original: fake for fake, original in self.originals.items()}
        mask = sum(1 << column for column in range(TOTAL_CHUNKS) if not (self.admits and column in self.lost))
        return tuple(
            Offer(o.index, fakes.get(ManifestDigest(o.manifest), o.manifest), o.row, mask.to_bytes(8, "big"))
            for o in super().offers(row_ids)
        )

    def record(self, digest: ManifestDigest, for_peer: bool = False) -> ObjectRecord | None:
        record = self.rewritten.get(digest) or super().record(digest, for_peer)
        return self.on_record(record) if record and for_peer and self.on_record else record

    def read_chunks(self, digest: ManifestDigest, row: int, columns: Sequence[int]) -> list[tuple[int, memoryview]]:
        original = self.originals.get(digest, digest)
        chunks = []
        for column, chunk in super().read_chunks(original, row, [c for c in columns if c not in self.lost]):
            if self.stall_after is not None:
                self.stall_after -= 1
                if self.stall_after < 0:
                    self.stalled_at = self.stalled_at or time.monotonic()
                    self.go_on.wait(10)
            changed = bytearray(chunk)
            if self.on_chunk:
                self.on_chunk(column, changed)
            chunks.append((column, memoryview(bytes(changed))))
        return chunks


def is_whole(node: TestNode, answer: Answer) -> bool:
    return answer.end_segment == len(KEYS) and len(answer.rows) == ROWS_NEEDED and node.rows_are_right(answer, KEYS)


def keys_by_id() -> dict[RowId, RowKey]:
    places = [(key, part, rank) for key in KEYS for part in range(2) for rank in range(2)]
    row_keys = [row_key(*place) for place in places]
    return {row_id(NETWORK, key): key for key in row_keys}


def flip(data: bytes, position: int, bit: int = 1) -> bytes:
    changed = bytearray(data)
    changed[position] ^= bit
    return bytes(changed)


# --- what works ---------------------------------------------------------------------------------


async def test_b_gets_byte_for_byte_what_a_held(pair: Pair) -> None:
    a, b = await pair.start()
    answer = await b.look_up(KEYS)
    assert is_whole(b, answer)
    assert (answer.source, answer.verified_by, answer.reason) == ("network", "ed25519+kzg+blake3", "hit")
    assert a.failures() == b.failures() == {}
    b.release()
    again = await b.look_up(KEYS)
    assert (again.source, again.verified_by) == ("memory", "memory")
    assert is_whole(b, again)


async def test_a_prefix_of_a_longer_prompt_is_fetched_with_its_own_window(pair: Pair) -> None:
    _, b = await pair.start()
    wanted = KEYS[:2] + keys("other", 3)
    answer = await b.look_up(wanted)
    assert answer.end_segment == 2
    assert b.rows_are_right(answer, wanted)


async def test_after_a_restart_b_is_served_from_its_own_disk_and_serves_others(pair: Pair) -> None:
    a, b = await pair.start()
    assert is_whole(b, await b.look_up(KEYS))
    await pair.stop(b)
    await pair.stop(a)
    c_identity = Identity.load(pair._at("c"))
    b = pair.node("b", (peer_of(a.identity), peer_of(c_identity)))
    answer = await b.look_up(KEYS)
    assert (answer.source, answer.verified_by) == ("disk", "blake3")
    assert is_whole(b, answer)
    # C trusts A, which made the rows, and gets them from B: A's manifest vouches for them.
    c = pair.node("c", (b.address, peer_of(a.identity)))
    await until(lambda: c.transport.is_connected(b.identity.peer_id))
    assert is_whole(c, await c.look_up(KEYS))


# --- nodes that found each other ----------------------------------------------------------------


def introduce(*nodes: TestNode) -> None:
    """Tell every node of every other, as discovery would."""
    for node in nodes:
        node.introduce(*(other.record for other in nodes if other is not node))


async def has_document(node: TestNode) -> None:
    node.stage(KEYS)
    await until(lambda: node.store.rows == ROWS_STORED)


async def test_nodes_that_know_each_other_only_by_discovery_share_a_prefix(pair: Pair) -> None:
    a, b = pair.node("a", (), network_key=NETWORK_KEY), pair.node("b", (), network_key=NETWORK_KEY)
    await has_document(a)
    introduce(a, b)
    assert b.node.prefixes.peers == (a.identity.peer_id,)
    assert is_whole(b, await b.look_up(KEYS))
    assert a.failures() == b.failures() == {}
    assert b.trust.standings.service(a.identity.peer_id, clock.now()) > 0.1
    # Both can announce what they have: A its objects, B those that it keeps.
    await until(lambda: len(rows_told(a)) == ROWS_STORED)
    await until(lambda: rows_told(b) <= rows_told(a) and len(b.stored) >= 4)
    assert {event.manifest for event in b.stored} <= {event.manifest for event in a.stored}
    b.introduce()
    assert b.node.prefixes.peers == ()
    assert (await b.look_up(keys("other", 3))).reason == "no_peers"


async def test_what_the_disk_kept_is_reported_again_and_private_rows_never_are(pair: Pair) -> None:
    a = pair.node("a", ())
    a.stage(keys("secret", 2), shareable=False)
    await has_document_besides(a, 2 * 2 * 2)
    await until(lambda: len(rows_told(a)) == ROWS_STORED)
    await pair.stop(a)
    assert len(rows_told(a)) == ROWS_STORED
    a = pair.node("a", ())
    assert a.stored == []
    a.prefixes.report_stored()
    assert len(rows_told(a)) == ROWS_STORED


def rows_told(node: TestNode) -> set[bytes]:
    """What the node told its listener; an object is reported a moment after its rows are stored."""
    return {row for event in node.stored if event.shareable for row in event.row_ids}


async def has_document_besides(node: TestNode, rows: int) -> None:
    node.stage(KEYS)
    await until(lambda: node.store.rows == ROWS_STORED + rows)


async def test_a_stranger_is_neither_served_nor_asked(pair: Pair) -> None:
    a = pair.node("a", (), network_key=NETWORK_KEY)
    await has_document(a)
    for name, key in (("without", None), ("wrong", sha256(b"another network's key"))):
        stranger = pair.node(name, (), network_key=key)
        introduce(a, stranger)
        assert a.node.prefixes.peers == stranger.node.prefixes.peers == ()
        # It knows where A is, and would trust A's manifests.
        believer = pair.node(f"{name}-b", (a.address,), network_key=key)
        introduce(a, believer)
        assert (await believer.look_up(KEYS)).end_segment == 0
        assert a.failures()["unknown_peer"]


async def test_a_manifest_outlives_its_producer_where_the_network_key_vouches_for_it(pair: Pair) -> None:
    d_identity = Identity.load(pair._at("d"))
    a = pair.node("a", (), network_key=NETWORK_KEY)
    b = pair.node("b", (peer_of(d_identity),), network_key=NETWORK_KEY)
    await has_document(a)
    introduce(a, b)
    assert is_whole(b, await b.look_up(KEYS))
    await until(lambda: b.store.rows == ROWS_NEEDED)
    await pair.stop(a)
    c = pair.node("c", (), network_key=NETWORK_KEY)
    introduce(b, c)
    assert not c.trust.is_member(a.identity.public_key)
    answer = await c.look_up(KEYS)
    assert is_whole(c, answer)
    assert answer.source == "network"
    # After a restart, with no peer to vouch for A, its rows still count: the tag is stored with them.
    await until(lambda: c.store.rows == ROWS_NEEDED)
    await pair.stop(c)
    c = pair.node("c", (), network_key=NETWORK_KEY)
    assert is_whole(c, await c.look_up(KEYS))
    # Under another key the tag is worthless, on the wire and on the disk.
    d = pair.node("d", (b.address,), network_key=sha256(b"another network's key"))
    await until(lambda: d.transport.is_connected(b.identity.peer_id))
    await refused(b, d, "untrusted_producer")
    await pair.stop(c)
    c = pair.node("c", (), network_key=sha256(b"another network's key"))
    assert c.store.rows == 0


async def test_a_peer_that_is_dropped_in_the_middle_costs_no_more_than_a_stall(pair: Pair) -> None:
    a = pair.node("a", (), store=Tampered, network_key=NETWORK_KEY)
    b = pair.node("b", (), network_key=NETWORK_KEY)
    await has_document(a)
    introduce(a, b)
    assert isinstance(a.store, Tampered)
    a.store.stall_after = 40
    looking = asyncio.create_task(b.look_up(KEYS))
    await until(lambda: isinstance(a.store, Tampered) and a.store.stalled_at)
    dropped_at = time.monotonic()
    b.introduce()
    answer = await looking
    assert time.monotonic() - dropped_at < FAULT_S
    a.store.go_on.set()
    assert answer.end_segment < len(KEYS)
    assert "stalled" not in {reason for _, reason in b.transport.charges}
    b.release()
    await until(lambda: len(b.cache) * 64 * KiB <= b.arena.capacity_bytes - b.arena.free_bytes)


# --- what stays on the node ----------------------------------------------------------------------


async def test_private_rows_serve_their_own_node_only(pair: Pair) -> None:
    a, b = await pair.start(shareable=False)
    assert (await b.look_up(KEYS)).end_segment == 0
    assert is_whole(a, await a.look_up(KEYS))


async def test_a_private_lookup_asks_nobody(pair: Pair) -> None:
    a, b = await pair.start()
    answer = await b.look_up(KEYS, may_ask_peers=False)
    assert (answer.end_segment, answer.reason) == (0, "local_only")
    assert a.metrics.bytes_total.labels("served")._value.get() == 0


async def test_64_mib_cost_the_core_at_most_200_events(pair: Pair) -> None:
    layout = Layout(bytes(32), 256, (Part(0, 4 * MiB),), 1)
    wanted = keys("long", 16)
    a = pair.node("a", (peer_of(pair.b_identity),), arena_bytes=80 * MiB)
    a.stage(wanted, layout)
    await until(lambda: a.store.rows == len(wanted))
    b = pair.node("b", (a.address,), arena_bytes=80 * MiB)
    await until(lambda: b.transport.is_connected(a.identity.peer_id))
    answer = await b.look_up(wanted, layout, deadline_ms=30_000)
    assert answer.end_segment == len(wanted)
    assert b.rows_are_right(answer, wanted)
    assert b.driver.events <= 200


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("admits", [True, False])
@pytest.mark.parametrize("lost", [frozenset(range(32)), frozenset(range(32, 64)), frozenset(range(0, 64, 2))])
async def test_32_lost_chunks_cost_nothing(pair: Pair, lost: frozenset[int], admits: bool) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.lost, a.store.admits = lost, admits
    assert is_whole(b, await b.look_up(KEYS))


@pytest.mark.parametrize("admits", [True, False])
async def test_33_lost_chunks_are_a_prompt_miss(pair: Pair, admits: bool) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.lost, a.store.admits = frozenset(range(10, 43)), admits
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert answer.after_s < FAULT_S


# --- forgeries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 100, -1])
async def test_a_flipped_bit_in_a_chunk_is_refused_and_charged(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def change(column: int, chunk: bytearray) -> None:
        chunk[position] ^= 0x80

    a.store.on_chunk = change
    await refused(a, b, "bad_digest")


FIELDS = {
    "network": 0,
    "fingerprint": 32,
    "chunk bytes": 64,
    "chunk bytes, low": 67,
    "nonce": 68,
    "commitment": 80,
    "producer": 128,
    "created at": 160,
    "row count": 168,
    "row id": 169,
    "row length": 201,
    "row length, low": 208,
    "derived": 209,
    "origin": 210,
    "tag": 242,
    "signature": -64,
    "signature, end": -1,
}


@pytest.mark.parametrize("position", FIELDS.values(), ids=FIELDS)
async def test_a_flipped_byte_anywhere_in_a_manifest_is_refused_and_charged(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.on_record = lambda record: dataclasses.replace(record, raw=flip(record.raw, position))
    await refused(a, b, "forged", "malformed")


@pytest.mark.parametrize("position", FIELDS.values(), ids=FIELDS)
async def test_a_forged_manifest_offered_under_its_own_digest_is_refused(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def forge(record: ObjectRecord) -> ObjectRecord:
        raw = flip(record.raw, position)
        return dataclasses.replace(record, raw=raw, digest=ManifestDigest(sha256(raw)))

    a.store.rewrite(forge)
    reasons = ("malformed", "wrong_network", "untrusted_producer", "bad_signature", "from_the_future")
    await refused(a, b, *reasons)


@pytest.mark.parametrize("position", [0, 16, 31, 32 * 64 * 32 // 2, -1])
async def test_a_flipped_bit_in_the_digest_table_is_refused_and_charged(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.on_record = lambda r: dataclasses.replace(r, digests=flip(r.digests, position % len(r.digests)))
    await refused(a, b, "bad_proof")


@pytest.mark.parametrize("position", [0, 1, 24, 47])
async def test_a_flipped_bit_in_the_proof_is_refused_and_charged(pair: Pair, position: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.on_record = lambda record: dataclasses.replace(record, proof=flip(record.proof, position))
    await refused(a, b, "bad_proof")


async def test_a_table_of_another_size_is_refused_and_charged(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.on_record = lambda record: dataclasses.replace(record, digests=record.digests[:-32])
    await refused(a, b, "malformed")


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 0])
async def test_a_manifest_that_claims_an_absurd_length_reserves_nothing(pair: Pair, length: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def claim(record: ObjectRecord) -> ObjectRecord:
        rows = tuple(dataclasses.replace(row, length=length) for row in record.manifest.rows)
        return signed_by(dataclasses.replace(record.manifest, rows=rows), a.identity.signing_key, record)

    a.store.rewrite(claim)
    await refused(a, b, "malformed")
    assert b.arena.free_bytes == b.arena.capacity_bytes


async def test_a_row_of_another_length_or_name_than_asked_for_is_refused(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def shorten(record: ObjectRecord) -> ObjectRecord:
        manifest, row_keys = record.manifest, keys_by_id()
        rows = []
        for number, row in enumerate(manifest.rows):
            tag = manifest.tag_of(row_keys[row.row_id], row.length - 1, record.row_digests(number))
            rows.append(dataclasses.replace(row, length=row.length - 1, tag=tag))
        return signed_by(dataclasses.replace(manifest, rows=tuple(rows)), a.identity.signing_key, record)

    a.store.rewrite(shorten)
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert b.transport.charges[a.identity.peer_id, "false_offer"]


async def test_a_flipped_bit_in_a_signed_tag_is_refused_and_its_producer_charged(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)

    def mistag(record: ObjectRecord) -> ObjectRecord:
        first, *others = record.manifest.rows
        rows = (dataclasses.replace(first, tag=flip(first.tag, 15)), *others)
        return signed_by(dataclasses.replace(record.manifest, rows=rows), a.identity.signing_key, record)

    a.store.rewrite(mistag)
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert b.transport.charges[a.identity.peer_id, "bad_tag"]
    assert not b.metrics.bytes_total.labels("fetched")._value.get(), "no chunk was asked for"


async def test_a_producer_that_is_not_trusted_counts_for_nothing(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    stranger = SigningKey(bytes(31) + b"s")

    def claim(record: ObjectRecord) -> ObjectRecord:
        manifest = dataclasses.replace(record.manifest, producer=stranger.verify_key.encode())
        return signed_by(manifest, stranger, record)

    a.store.rewrite(claim)
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert answer.after_s < FAULT_S
    assert b.failures()["untrusted_producer"]


async def test_chunks_that_are_no_codeword_condemn_their_object(pair: Pair) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    # A itself signs a non-codeword: every chunk verifies, but the row can't be rebuilt from them.
    layout, name = Layout(bytes(32), 256, (Part(0, 60_000),), 1), keys("bad", 1)
    chunk_bytes, row = 2304, row_key(name[0], 0, 0)
    chunks = [bytes([column]) * chunk_bytes for column in range(TOTAL_CHUNKS)]
    digests = b"".join(chunk_digest(chunk) for chunk in chunks)
    commitment, proof = await pair.pool.commit(digest_blob(digests, 1))
    record = sign_record(
        a.identity.signing_key,
        NETWORK,
        bytes(32),
        chunk_bytes,
        bytes(12),
        ((row, 60_000),),
        digests,
        commitment,
        proof,
        0,
    )
    a.store.put_columns(record, 0, {column: memoryview(chunk) for column, chunk in enumerate(chunks)})
    a.store.lost = frozenset({3})
    answer = await b.look_up(name, layout)
    assert answer.end_segment == 0
    assert b.failures()["condemned"]
    assert b.store.record(record.digest) is None
    assert (await b.look_up(name, layout)).end_segment == 0


# --- peers that are gone or full ----------------------------------------------------------------


@pytest.mark.parametrize("chunks_before", [0, 40, 200])
async def test_a_peer_that_freezes_in_the_middle_costs_a_stall(pair: Pair, chunks_before: int) -> None:
    a, b = await pair.start(Tampered)
    assert isinstance(a.store, Tampered)
    a.store.stall_after = chunks_before
    answer = await b.look_up(KEYS)
    after_s = time.monotonic() - a.store.stalled_at
    a.store.go_on.set()
    assert answer.end_segment < len(KEYS)
    assert answer.reason == "stalled"
    assert after_s < FAULT_S
    assert b.transport.charges[a.identity.peer_id, "stalled"]
    b.release()
    await until(lambda: len(b.cache) * 64 * KiB <= b.arena.capacity_bytes - b.arena.free_bytes)


@pytest.mark.parametrize("signal_sent", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_process_that_stops_in_the_middle_costs_a_stall(pair: Pair, signal_sent: signal.Signals) -> None:
    layout, wanted = layout_of(MiB), keys("process", 40)
    directory, peer = str(pair._at("p")), peer_of(pair.b_identity)
    arguments = [directory, peer, str(len(wanted)), str(MiB)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.peer_process", *arguments, stdin=PIPE, stdout=PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        address = (await process.stdout.readline()).decode().strip()
        b = pair.node("b", (address,))
        await until(lambda: b.transport.is_connected(b.transport.peers[0]))
        looking = asyncio.create_task(b.look_up(wanted, layout))
        await until(lambda: len(b.cache) >= 3)
        process.send_signal(signal_sent)
        stopped_at = time.monotonic()
        answer = await looking
        assert time.monotonic() - stopped_at < FAULT_S
        assert 0 < answer.end_segment < len(wanted)  # what came before the fault is used
        assert b.rows_are_right(answer, wanted)
        b.release()
        # The next lookup doesn't wait for that peer again.
        asked = b.transport.charges.copy()
        assert (await b.look_up(keys("other", 3), layout)).end_segment == 0
        assert b.transport.charges == asked
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_second_holder_finishes_what_the_first_left(pair: Pair) -> None:
    c_identity = Identity.load(pair._at("c"))
    a = pair.node("a", (peer_of(pair.b_identity), peer_of(c_identity)), store=Tampered)
    a.stage(KEYS)
    await until(lambda: a.store.rows == ROWS_STORED)
    c = pair.node("c", (a.address, peer_of(pair.b_identity)))
    await until(lambda: c.transport.is_connected(a.identity.peer_id))
    assert is_whole(c, await c.look_up(KEYS))
    await until(lambda: c.store.rows == ROWS_NEEDED)
    b = pair.node("b", (a.address, c.address))
    await until(lambda: all(b.transport.is_connected(peer) for peer in b.transport.peers))
    assert isinstance(a.store, Tampered)
    a.store.stall_after = 10
    answer = await b.look_up(KEYS)
    a.store.go_on.set()
    assert is_whole(b, answer)


async def test_a_full_arena_is_a_miss(pair: Pair) -> None:
    _, b = await pair.start(arena_bytes=4 * 64 * KiB)
    answer = await b.look_up(KEYS)
    assert (answer.end_segment, answer.reason) == (0, "arena_full")
    assert b.failures()["arena_full"]
    await until(lambda: b.arena.free_bytes + len(b.cache) * 128 * KiB >= b.arena.capacity_bytes)


async def test_a_full_disk_leaves_the_rows_in_memory(pair: Pair) -> None:
    a = pair.node("a", (), disk_bytes=1000)
    a.stage(KEYS)
    await until(lambda: a.failures().get("disk_full"))
    answer = await a.look_up(KEYS)
    assert answer.source == "memory"
    assert is_whole(a, answer)


async def test_a_fetcher_with_a_full_disk_uses_what_it_fetched(pair: Pair) -> None:
    _, b = await pair.start(b_disk_bytes=1000)
    assert is_whole(b, await b.look_up(KEYS))
    await until(lambda: b.failures().get("disk_full"))
    assert b.store.rows == 0


async def test_damage_on_the_own_disk_is_noticed_and_removed(pair: Pair) -> None:
    a = pair.node("a", ())
    a.stage(KEYS)
    await until(lambda: a.store.rows == ROWS_STORED)
    await pair.stop(a)
    for path in (pair.directory / "a" / "chunks").glob("*.obj"):
        path.write_bytes(bytes(path.stat().st_size))
    a = pair.node("a", ())
    assert (await a.look_up(KEYS)).end_segment == 0
    assert a.failures()["damaged"]
    await until(lambda: a.store.rows < ROWS_STORED)


async def test_a_few_bad_chunks_on_the_own_disk_are_rebuilt(pair: Pair) -> None:
    a = pair.node("a", ())
    a.stage(KEYS)
    await until(lambda: a.store.rows == ROWS_STORED)
    await pair.stop(a)
    for path in (pair.directory / "a" / "chunks").glob("*.obj"):
        with path.open("r+b") as file:
            file.write(bytes(3000))
    a = pair.node("a", ())
    answer = await a.look_up(KEYS)
    assert answer.source == "disk"
    assert is_whole(a, answer)


def signed_by(manifest: Manifest, key: SigningKey, record: ObjectRecord) -> ObjectRecord:
    signed = manifest.sign(key)
    return ObjectRecord(signed.digest, signed.encode(), signed, record.digests, record.proof)


async def refused(a: TestNode, b: TestNode, *reasons: str) -> None:
    """B's lookup misses in time, for one of these reasons; guilty peers are charged."""
    answer = await b.look_up(KEYS)
    assert answer.end_segment == 0
    assert answer.after_s < FAULT_S
    seen = set(reasons) & b.failures().keys()
    assert seen, b.failures()
    guilty = seen - {"untrusted_producer", "wrong_network", "from_the_future"}
    assert all(b.transport.charges[a.identity.peer_id, reason] for reason in guilty)
    assert len(b.cache) == 0
    assert b.store.rows == 0
