"""The local side of the network: what this host's clients, its response store and its audits have to do with it."""

import asyncio
from collections.abc import Iterable
from typing import Literal, Protocol

from ...core.events.conduct import AnswerAudited
from ...core.events.node_state import ServedChanged
from ...core.events.stored_responses import ResponsesGone, ResponseStored
from ...core.peers.trust import Trust
from ...core.records.ids import RequestKey
from .. import clock
from ..responses.store_changes import ServableEntry
from .driver import Driver
from .network_lookups import NetworkLookups


class Shared(Protocol):
    """The fleet's shared store of responses (RedisResponses)."""

    def heard(self, stored: tuple[ServableEntry, ...]) -> None:
        """Take what this node can serve now; from any thread."""

    def purge(self, keys: Iterable[bytes]) -> None:
        """Delete these entries."""


class NetworkResponses:
    """Looks responses up elsewhere, and reports what this node has."""

    def __init__(
        self,
        driver: Driver,
        lookups: NetworkLookups,
        trust: Trust,
        share: Literal["private", "network", "public"],
        shared: Shared | None,
    ) -> None:
        self._driver = driver
        self._lookups = lookups
        self._trust = trust
        self._shares = share != "private"
        self._shared = shared
        self._loop = asyncio.get_running_loop()

    def find(self, lookup: int, request_key: RequestKey, model_digest: bytes, deadline_ms: int) -> None:
        """Look for a response elsewhere (response_lookups.ResponseFinder)."""
        joined = self._driver.joined
        hints = joined.hints if joined is not None and self._shares else None
        self._lookups.find(lookup, request_key, model_digest, deadline_ms, hints)

    def release(self, lookup: int) -> None:
        """The client no longer waits for the lookup."""
        self._lookups.release(lookup)

    def used(self, keys: Iterable[bytes]) -> None:
        """Clients of this host had hits of these RequestKeys."""
        if self._driver.joined is not None and self._shares:
            self._lookups.used(keys)

    def purge(self, keys: Iterable[bytes]) -> None:
        """The operator wants these gone, from the shared store too; what peers have fetched stays there."""
        keys = tuple(keys)
        self._lookups.purge(keys)
        if self._shared is not None:
            self._shared.purge(keys)

    def heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        """What the response store can serve now, and what no more (store_changes.Listener); from any thread."""
        self._loop.call_soon_threadsafe(self._heard, stored, gone)
        if self._shared is not None:
            self._shared.heard(stored)

    def served(self, event: ServedChanged) -> None:
        """What the engines of this host serve now; a node that shares nothing tells no peer."""
        if self._shares:
            self._driver.submit(event)

    def audited(self, event: AnswerAudited) -> bool:
        """An audit of this host; whether its signer is convicted."""
        self._driver.submit(event)
        return self._trust.is_convicted(event.evidence.signer, clock.now())

    def _heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        if not self._shares:
            return
        if gone:
            self._driver.submit(ResponsesGone(gone))
        for told in stored:
            self._driver.submit(ResponseStored(told.request_hash, told.expires_at_ms, told.computed))
