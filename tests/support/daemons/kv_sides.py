"""Two ends of the bulk transport in one process, over real sockets."""

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.peers.dials import Dials
from hyperspace_vllm.core.records.ids import ManifestDigest, PeerId, RowKey, network_id, row_id, sha256
from hyperspace_vllm.core.records.limits import (
    MiB,
)
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.identity import Identity
from hyperspace_vllm.daemon.kv.chunk_store import ChunkStore
from hyperspace_vllm.daemon.kv.chunk_transport import ChunkTransport
from hyperspace_vllm.daemon.kv.object_codec import ObjectRecord, encode_row, new_nonce, sign_record
from hyperspace_vllm.daemon.metrics import Metrics
from tests.support.nodes import peer_of, trust_of

CHUNK = 256 * 301  # large enough to be sent without a copy


ROW_KEY = RowKey(sha256(b"row"))
ROW_ID = row_id(network_id("test"), ROW_KEY)


def put_object(store: ChunkStore) -> ObjectRecord:
    nonce, row = new_nonce(), secrets.token_bytes(32 * CHUNK)
    with store.new_object(1, CHUNK) as writer:
        digests = encode_row(memoryview(row), bytes(32), nonce, CHUNK, writer.row(0))
        record = sign_record(
            SigningKey(bytes(32)),
            network_id("test"),
            bytes(32),
            CHUNK,
            nonce,
            ((ROW_KEY, len(row)),),
            digests,
            bytes(48),
            bytes(48),
            0,
        )
        store.publish(writer, record, shareable=True)
    return record


class Side:
    """One end: a transport with its store."""

    def __init__(self, directory: Path, *peers: str) -> None:
        self.identity = Identity.load(directory)
        self.store = ChunkStore(directory / "chunks", 64 * MiB)
        self.metrics = Metrics()
        self.violations: list[PeerId] = []
        self.trust = trust_of(self.identity, peers)
        self.transport = ChunkTransport(
            Config(data_dir=directory, peers=peers),
            self.identity,
            self.store,
            self.metrics,
            self.trust,
            Dials(clock.now()),
            self.violations.append,
        )

    @property
    def address(self) -> str:
        return f"{self.identity.peer_id}@{self.transport.endpoint}"


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Side, Side]]:
    """A server and a client that know each other."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    server = Side(tmp_path / "a", peer_of(Identity.load(tmp_path / "b")))
    client = Side(tmp_path / "b", server.address)
    yield server, client
    await client.transport.close()
    await server.transport.close()


async def fetch(
    client: Side, server: Side, digest: ManifestDigest, columns: tuple[int, ...], timeout_s: float = 5.0, row: int = 0
) -> dict[int, bytes]:
    chunks: dict[int, bytes] = {}
    peer = server.identity.peer_id
    async with aclosing(client.transport.chunks(peer, digest, row, columns, CHUNK, timeout_s)) as arriving:
        async for batch in arriving:
            chunks |= {column: bytes(chunk) for column, chunk in batch}
    return chunks
