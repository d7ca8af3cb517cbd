"""Answers of a real model, and of a node that is suspected."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from nacl.signing import SigningKey
from starlette.types import Message, Receive, Scope, Send

from bench.servers import MODELS, Server
from hyperspace_vllm.api import audits
from hyperspace_vllm.core.local.messages import NodeMessage
from hyperspace_vllm.core.local.response_cache_messages import FindResponse, ResponseFound, ResponseHint
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.response.answer_ids import without_ids
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.daemon.clock import wall_ms
from tests.support.cached_server import Bench, Node, benches

CHAT: dict[str, Any] = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "Why?"}]}


TEXT: dict[str, Any] = {"model": "demo", "temperature": 0, "prompt": "Once"}


def message(finish: str = "stop", **fields: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", **fields}}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("audit", MODELS["gemma"], tmp_path_factory.mktemp("audit"), connector=False) as server:
        yield server.ready()


class Suspect:
    """A node that has a response for everything, by a signer that is suspected."""

    def __init__(self) -> None:
        self.says: dict[str, Any] = {}

    def find(self, node: Node, asked: FindResponse) -> None:
        body = msgspec.json.encode(without_ids({**self.says}))
        at_ms = wall_ms() - 60_000
        key, network = RequestKey(asked.request_key), network_id("test")
        proof = make_proof(SigningKey(bytes(32)), network, key, body, asked.model_digest, "vllm", at_ms).encode()
        expires_at_ms = at_ms + RESPONSE_TTL_MS
        hint: NodeMessage = ResponseHint(asked.lookup, True)
        found = ResponseFound(asked.lookup, body, proof, at_ms, expires_at_ms, "12D3KooW", "gossip", "members", True)
        node.inbox += [hint, found]


@pytest.fixture
async def bench(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """A cache in front of the real server, one audit straight after another."""
    monkeypatch.setattr(audits, "AUDIT_SHARE", 1.0)
    async with benches(tmp_path) as make, httpx.AsyncClient(base_url=server.url, timeout=120) as upstream:
        bench = await make(served_models=frozenset({"demo"}), network_deadline_s=30.0)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            body = (await receive()).get("body", b"")
            answer = await upstream.post(scope["path"], content=body, headers={"content-type": "application/json"})
            start: Message = {"type": "http.response.start", "status": answer.status_code, "headers": []}
            await send(start)
            await send({"type": "http.response.body", "body": answer.content})

        bench.cache.app = app
        yield bench
