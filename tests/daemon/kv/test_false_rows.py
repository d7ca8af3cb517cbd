"""Rows of prompts that their producer doesn't know: refused when their manifest comes, and charged to who signed it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.ids import ManifestDigest, RowId, RowKey, SegmentKey, peer_id, row_id, row_key, sha256
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import TOTAL_CHUNKS, GiB, MiB
from hyperspace_vllm.core.records.manifest import chunk_bytes_for, digest_blob
from hyperspace_vllm.core.records.wire import Offer
from hyperspace_vllm.daemon.kv.chunk_store import ChunkStore
from hyperspace_vllm.daemon.kv.object_codec import ObjectRecord, chunk_digest, new_nonce, sign_record
from tests.support.nodes import NETWORK, SharedPool, TestNode, keys, peer_of
from tests.support.until import until_async

pytestmark = [pytest.mark.io, pytest.mark.asyncio(loop_scope="module")]

ROW = 60_000
LAYOUT = Layout(bytes(32), 256, (Part(0, ROW),), 1)
SEGMENTS = 3
CHUNK = bytes([7]) * chunk_bytes_for(ROW)
DIGESTS = chunk_digest(CHUNK) * TOTAL_CHUNKS
LIAR = SigningKey(bytes(31) + b"l")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[SharedPool]:
    async with SharedPool.started() as pool:
        yield pool


@pytest_asyncio.fixture(loop_scope="module")
async def nodes() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as nodes:
        yield nodes


class Inventor(ChunkStore):
    """Has every row that is asked for, under a manifest that `signing_key` signs for the question."""

    def __init__(self, directory: Path, signing_key: SigningKey, committed: tuple[bytes, bytes]) -> None:
        super().__init__(directory, GiB)
        self.signing_key = signing_key
        self.row_keys: dict[RowId, RowKey] = {}  # of prompts that it does know
        self.invented: dict[ManifestDigest, ObjectRecord] = {}
        self._committed = committed

    def offers(self, row_ids: Sequence[bytes]) -> tuple[Offer, ...]:
        wanted = [RowId(each) for each in row_ids]
        named = tuple((self.row_keys.get(each, RowKey(sha256(each))), ROW) for each in wanted)
        digests, nonce = DIGESTS * len(wanted), new_nonce()
        made = sign_record(self.signing_key, NETWORK, bytes(32), len(CHUNK), nonce, named, digests, *self._committed, 0)
        rows = tuple(replace(row, row_id=each) for row, each in zip(made.manifest.rows, wanted, strict=True))
        manifest = replace(made.manifest, rows=rows).sign(self.signing_key)
        self.invented[manifest.digest] = replace(made, digest=manifest.digest, raw=manifest.encode(), manifest=manifest)
        return tuple(Offer(n, manifest.digest, n, b"\xff" * 8) for n in range(len(wanted)))

    def record(self, digest: ManifestDigest, for_peer: bool = False) -> ObjectRecord | None:
        return self.invented.get(digest)

    def columns(self, digest: ManifestDigest, row: int) -> int:
        return (1 << TOTAL_CHUNKS) - 1

    def read_chunks(self, digest: ManifestDigest, row: int, columns: Sequence[int]) -> list[tuple[int, memoryview]]:
        return [(column, memoryview(CHUNK)) for column in columns]


class Network:
    """A liar that signs by itself or serves what `producer` signed, an honest holder of `held`, and their victim."""

    def __init__(self, nodes: AsyncExitStack, directory: Path, pool: SharedPool) -> None:
        self._nodes, self._directory, self._pool = nodes, directory, pool

    async def start(self, held: tuple[SegmentKey, ...] = (), producer: SigningKey | None = None) -> None:
        committed = await self._pool.commit(digest_blob(DIGESTS * SEGMENTS, SEGMENTS))
        self.victim = self._node("victim")
        victim = peer_of(self.victim.identity)
        self.liar, self.honest = self._node("liar", victim), self._node("honest", victim)
        self.inventor = Inventor(self._at("invented"), producer or self.liar.identity.signing_key, committed)
        self.liar.transport._server._store = self.inventor
        await self.victim.close()
        self.victim.arena.close()
        known = [self.liar.address, self.honest.address]
        known += [f"{peer_id(producer.verify_key.encode())}@127.0.0.1:1"] if producer else []
        self.victim = self._node("victim", *known)
        if held:
            self.honest.stage(held, LAYOUT)
            await until_async(lambda: self.honest.store.rows == len(held))
        for each in (self.liar, self.honest):
            await until_async(partial(self.victim.transport.is_connected, each.identity.peer_id))

    def _node(self, name: str, *peers: str) -> TestNode:
        node = TestNode(self._at(name), peers, arena_bytes=8 * MiB, compute=self._pool)
        self._nodes.push_async_callback(node.close)
        return node

    def _at(self, name: str) -> Path:
        (self._directory / name).mkdir(exist_ok=True)
        return self._directory / name


@pytest.fixture
def network(nodes: AsyncExitStack, tmp_path: Path, pool: SharedPool) -> Network:
    return Network(nodes, tmp_path, pool)


def fetched_bytes(node: TestNode) -> int:
    return int(node.metrics.bytes_total.labels("fetched")._value.get())


async def test_rows_of_an_unknown_prompt_are_refused_before_a_chunk_and_their_producer_is_charged(
    network: Network,
) -> None:
    await network.start()
    victim, liar = network.victim, network.liar.identity.peer_id
    answer = await victim.look_up(keys("secret", SEGMENTS), LAYOUT)
    assert (answer.end_segment, answer.rows) == (0, ())
    assert victim.transport.charges == {(liar, "bad_tag"): 1}
    assert fetched_bytes(victim) == 0
    assert not victim.trust.standings.has_earned(liar)
    assert (await victim.look_up(keys("another", SEGMENTS), LAYOUT)).end_segment == 0
    assert len(network.inventor.invented) == 1, "a liar is not asked again for a while"


async def test_the_rows_of_an_honest_holder_are_found_beside_the_false_ones(network: Network) -> None:
    held = keys("document", SEGMENTS)
    await network.start(held)
    victim = network.victim
    answer = await victim.look_up(held, LAYOUT)
    assert (answer.end_segment, answer.source) == (SEGMENTS, "network")
    assert victim.rows_are_right(answer, held)
    assert {peer for peer, _ in victim.transport.charges} <= {network.liar.identity.peer_id}
    assert not victim.trust.standings.has_earned(network.liar.identity.peer_id)
    assert victim.trust.standings.has_earned(network.honest.identity.peer_id)


async def test_false_rows_are_charged_to_who_signed_them_and_not_to_who_has_them(network: Network) -> None:
    await network.start(producer=LIAR)
    victim = network.victim
    assert (await victim.look_up(keys("secret", SEGMENTS), LAYOUT)).end_segment == 0
    assert victim.transport.charges == {(peer_id(LIAR.verify_key.encode()), "bad_tag"): 1}
    assert fetched_bytes(victim) == 0


async def test_one_false_row_spoils_a_manifest_that_an_earlier_lookup_had_verified(network: Network) -> None:
    """What one lookup needs of a manifest may be true, and the rest of it false."""
    await network.start()
    victim, document = network.victim, keys("document", SEGMENTS)
    first = row_key(document[0], 0, 0)
    network.inventor.row_keys = {row_id(NETWORK, first): first}  # a prompt that begins alike, known to the liar
    ids = [row_id(NETWORK, row_key(key, 0, 0)) for key in document]
    (offer, *_) = network.inventor.offers(ids)
    network.inventor.offers = lambda row_ids: tuple(  # type: ignore[method-assign]
        Offer(n, offer.manifest, ids.index(RowId(each)), offer.columns) for n, each in enumerate(row_ids)
    )
    assert (await victim.look_up(document[:1], LAYOUT)).end_segment == 1
    victim.release()
    assert victim.transport.charges == {}
    assert (await victim.look_up(document, LAYOUT)).end_segment == 1, "what is here already"
    assert victim.transport.charges == {(network.liar.identity.peer_id, "bad_tag"): 1}
    await until_async(lambda: victim.store.record(ManifestDigest(offer.manifest)) is None)
