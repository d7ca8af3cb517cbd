"""What the L2 parts of all simulated hosts share: links, objects, conversations, the truth and its checker."""

import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

from ...core.records.ids import ManifestDigest
from ..setting import Setting
from .kv_checkers import CheckedPrefixes, KvChecker
from .kv_figures import KvFigures, kv_figures
from .kv_load import (
    CONVERSATIONS_PER_HOST,
    FIRST_PROMPT_MS,
    LAST_PROMPTS_MS,
    PROMPT_EVERY_MS,
    Conversations,
)
from .kv_truth import KvSuspects, KvTruth
from .sim_bulk import SimBulk
from .sim_chunk_server import SimChunkServer
from .sim_objects import SimObject


class KvHosts(KvSuspects, Protocol):
    """All hosts (Fleet)."""

    def number_of(self, peer: str) -> int: ...


class PromptedEngine(Protocol):
    """What clients send prompts to (SimEngine)."""

    @property
    def number(self) -> int: ...
    def ask_any(self) -> None: ...


class KvFleet:
    """One for the whole simulation of `size` hosts; `loss` is the probability that a message comes late."""

    def __init__(self, setting: Setting, hosts: KvHosts, size: int, loss: float) -> None:
        rng = random.Random(f"{setting.seed}/bulk")
        self.hosts = hosts
        self.bulk = SimBulk(setting.agenda, setting.network, rng, loss, self._admits)
        self.servers: dict[int, SimChunkServer] = {}
        self.objects: dict[ManifestDigest, SimObject] = {}
        self.conversations = Conversations(size * CONVERSATIONS_PER_HOST)
        self.truth = KvTruth(setting, self.bulk, hosts)
        self.checker = KvChecker(setting, hosts, self.bulk)
        self._agenda = setting.agenda
        self._network = setting.network
        self._rng = random.Random(f"{setting.seed}/prompts")
        self.loaded_bytes = 0  # of rows that engines got from peers

    def begin_prompts(self, engines: Sequence[PromptedEngine], until_ms: int) -> None:
        """Let the clients of these engines send prompts from FIRST_PROMPT_MS on."""
        last_ms = until_ms - LAST_PROMPTS_MS
        for engine in engines:
            self._agenda.after(FIRST_PROMPT_MS + self._pause_ms(), partial(self._prompt, engine, last_ms))

    def _prompt(self, engine: PromptedEngine, last_ms: int) -> None:
        if self._agenda.now_ms <= last_ms:
            if self._network.acts(engine.number):
                engine.ask_any()
            self._agenda.after(self._pause_ms(), partial(self._prompt, engine, last_ms))

    def _pause_ms(self) -> float:
        return self._rng.expovariate(1 / PROMPT_EVERY_MS)

    def check_end(self, hosts: Iterable[CheckedPrefixes], is_calm: bool) -> None:
        """Look at what is left over of honest hosts' work, and at what they got if nothing went wrong."""
        for host in hosts:
            self.checker.check_rest(host)
        if is_calm:
            self.checker.check_share(self.figures())

    def figures(self) -> KvFigures:
        """What came of all lookups."""
        return kv_figures(self.truth.lookups, self.bulk.payload_bytes, self.loaded_bytes, self.checker.found_slow)

    def _admits(self, server: int, asker: int) -> bool:
        return asker in self.servers[server].admitted
