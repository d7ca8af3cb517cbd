"""Response stores on a clock of the test's, and what they are given."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypedDict

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.local.message_fields import Scope
from hyperspace_vllm.core.local.response_cache_messages import StoreResponse
from hyperspace_vllm.core.records.ids import RequestKey, network_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.response.cache_proof import make_proof, request_hash
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.daemon.responses.store_changes import Listener, ServableEntry

NETWORK = network_id("test")


MODEL = bytes([8]) * 32


@dataclass(frozen=True)
class Signer:
    signing_key: SigningKey = field(default_factory=lambda: SigningKey(bytes(32)))


@dataclass
class Clock:
    now_ms: int = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms


Open = Callable[..., ResponseStore]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "responses.sqlite"


@pytest.fixture
def open_store(path: Path, clock: Clock) -> Iterator[Open]:
    opened: list[ResponseStore] = []

    def open_one(
        quota_bytes: int = 1 << 30, ttl_ms: int = RESPONSE_TTL_MS, listener: Listener | None = None
    ) -> ResponseStore:
        opened.append(ResponseStore(path, quota_bytes, ttl_ms, Signer(), NETWORK, clock))
        opened[-1].start(listener)
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def key(number: int) -> RequestKey:
    return RequestKey(number.to_bytes(32, "big"))


def response(
    number: int, body: bytes = b"{}", ttl_ms: int = RESPONSE_TTL_MS, scope: Scope = "network"
) -> StoreResponse:
    return StoreResponse(key(number), scope, MODEL, "vllm 0.32.0", ttl_ms, body)


PEER = SigningKey(bytes([5]) * 32)


class Fetched(TypedDict):
    """The arguments of `store_fetched`."""

    key: RequestKey
    body: bytes
    raw_proof: bytes
    computed_at_ms: int
    expires_at_ms: int
    scope: Scope


def fetched(number: int, body: bytes, computed_at_ms: int, scope: Scope = "network") -> Fetched:
    """What `store_fetched` takes for a response that a peer computed."""
    proof = make_proof(PEER, NETWORK, key(number), body, MODEL, "vllm 0.32.0", computed_at_ms)
    return {
        "key": key(number),
        "body": body,
        "raw_proof": proof.encode(),
        "computed_at_ms": computed_at_ms,
        "expires_at_ms": computed_at_ms + RESPONSE_TTL_MS,
        "scope": scope,
    }


class Heard:
    """A listener that remembers: what can be served, and everything told in order."""

    def __init__(self) -> None:
        self.servable: dict[bytes, ServableEntry] = {}
        self.calls: list[tuple[tuple[ServableEntry, ...], tuple[bytes, ...]]] = []

    def __call__(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        self.calls.append((stored, gone))
        self.servable.update((entry.request_hash, entry) for entry in stored)
        for name in gone:
            self.servable.pop(name, None)

    def numbers(self) -> list[int]:
        names = {request_hash(NETWORK, key(number)): number for number in range(1000)}
        return sorted(names[name] for name in self.servable)


NOISE = Random(1).randbytes(1024)  # which doesn't shrink
