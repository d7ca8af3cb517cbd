"""A response from a peer or from Redis: verified, opened, stored here, and passed to the lookup."""

import asyncio
from typing import Protocol

from ...core.local.message_fields import Scope
from ...core.peers.trust import Trust
from ...core.records.ids import NetworkId, RequestKey, peer_id
from ...core.records.limits import KiB
from ...core.records.now import Now
from ...core.records.peer_wire import Hit
from ...core.response.sealed_hit import Opened, judge_hit, unseal_hit
from .response_lookups import FoundResponse

OPENED_HERE_BYTES_MAX = 64 * KiB  # in 0.1 ms, on the loop: a thread would cost more
VERIFIED_BY = "ed25519"


class Stored(Protocol):
    """The store of fetched responses (ResponseStore)."""

    def store_fetched(
        self,
        key: RequestKey,
        body: bytes,
        raw_proof: bytes,
        computed_at_ms: int,
        expires_at_ms: int,
        scope: Scope,
    ) -> bool:
        """Store with the original proof; never blocks."""


async def open_fetched(
    hit: Hit,
    key: RequestKey,
    network: NetworkId,
    model_digest: bytes,
    trust: Trust,
    now: Now,
    on_trial: bool = False,
) -> Opened:
    """The response in `hit`; `Refused` or `ProtocolViolation` if it is not valid.

    `on_trial`: also of an untrusted signer, if it may be tried now.
    """

    def trusts(signer: bytes) -> bool:
        return trust.take_trial(signer, now) if on_trial else trust.trusts(signer, now)

    proof = judge_hit(hit, key, network, model_digest, trusts, trust.meet, now.wall_ms)
    if len(hit.sealed) <= OPENED_HERE_BYTES_MAX:
        return unseal_hit(hit, key, network, proof)
    return await asyncio.to_thread(unseal_hit, hit, key, network, proof)


def keep(store: Stored, key: RequestKey, opened: Opened, scope: Scope) -> None:
    """Store it, to be served under its own proof."""
    store.store_fetched(key, opened.body, opened.raw_proof, opened.proof.computed_at_ms, opened.expires_at_ms, scope)


def found_response(opened: Opened, source: str, trust: Trust, now: Now) -> FoundResponse:
    """The end of a lookup."""
    proof = opened.proof
    return FoundResponse(
        opened.body,
        opened.raw_proof,
        proof.computed_at_ms,
        opened.expires_at_ms,
        peer_id(proof.signer),
        source,
        VERIFIED_BY,
        trust.standings.suspects(proof.signer, now),
    )
