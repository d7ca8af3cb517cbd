"""A simulated engine: it asks its node for the prefixes of its clients' prompts, copies what it gets, prefills the rest
and has it published, as the connector does."""

import random
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ...core.events.prefix_reading import AnswerPrefix, PrefixReleased, PrefixWanted, RowOffer
from ...core.events.prefix_writing import RequestOver, RowArrived, SegmentKeyKnown
from ...core.events.vocabulary import PrefixEvent
from ...core.records.ids import SegmentKey, row_id, row_key
from ..setting import Setting
from .kv_fleet import KvFleet
from .kv_load import (
    COPY_MS,
    DEADLINE_MS,
    LAYOUT,
    ROW_BYTES,
    SEGMENT_PREFILL_MS,
    STEP_SEGMENTS,
)
from .sim_arena import SimArena
from .sim_lookup import SimLookup
from .sim_objects import SimDisk


class EngineNode(Protocol):
    """The node beside the engine (SimPrefixes)."""

    @property
    def number(self) -> int: ...
    @property
    def arena(self) -> SimArena: ...
    @property
    def disk(self) -> SimDisk: ...
    @property
    def staged(self) -> dict[int, str]: ...
    def submit(self, event: PrefixEvent) -> None: ...
    def later(self, delay_ms: float, act: Callable[[], None]) -> None: ...


class SimEngine:
    """One host's; prompts are prefilled side by side."""

    def __init__(self, setting: Setting, kv: KvFleet, node: EngineNode) -> None:
        self._setting = setting
        self._kv = kv
        self._node = node
        self.rng = random.Random(f"{setting.seed}/engine/{node.number}")
        self.number = node.number
        self._numbers = 0

    def restart(self) -> None:
        """The host starts anew."""
        self._client = f"engine {self._setting.network.life(self._node.number)}"
        self._open: dict[int, tuple[SimLookup, tuple[SegmentKey, ...]]] = {}
        self.leased: set[int] = set()  # answered lookups whose rows are being copied

    @property
    def is_idle(self) -> bool:
        """Whether every lookup has been answered and released."""
        return not self._open and not self.leased

    def ask_any(self) -> None:
        """A client's prompt, of whichever conversation is popular."""
        self.ask(self._kv.conversations.prompt(self.rng))

    def ask(self, prompt: tuple[SegmentKey, ...]) -> None:
        """A client's prompt: look its prefix up."""
        number = self._number()
        network_id, node = self._setting.network_id, self._node
        keys = [row_key(segment, 0, 0) for segment in prompt]
        row_ids = tuple(row_id(network_id, key) for key in keys)
        here = (key in node.arena or node.disk.find(name) is not None for key, name in zip(keys, row_ids, strict=True))
        local = next((segment for segment, is_here in enumerate(here) if not is_here), len(keys))
        life = self._setting.network.life(node.number)
        promised = self._kv.truth.promised(node.number, row_ids[local:])
        lookup = SimLookup(node.number, life, number, row_ids, self._setting.agenda.now_ms, local, promised)
        self._kv.truth.lookups.append(lookup)
        self._open[number] = lookup, prompt
        node.submit(PrefixWanted(number, LAYOUT, prompt, 0, len(prompt) * SEGMENT_PREFILL_MS, DEADLINE_MS, True))

    def asked(self, number: int, host: int) -> None:
        """The node asks a peer for something of a lookup."""
        if number in self._open:
            self._open[number][0].asked[host] = None

    def offered(self, number: int, offers: tuple[RowOffer, ...]) -> None:
        """A peer says what it has of a lookup's rows."""
        if number in self._open:
            self._open[number][0].offered.update(offer.row_id for offer in offers)

    def lookup(self, number: int) -> SimLookup | None:
        """One that has not been answered."""
        return self._open[number][0] if number in self._open else None

    def answered(self, answer: AnswerPrefix, from_peers: int) -> None:
        """Copy the rows, of which peers sent some, release them and compute the rest."""
        if answer.lookup not in self._open:
            return
        lookup, prompt = self._open.pop(answer.lookup)
        lookup.answered_ms = self._setting.agenda.now_ms
        lookup.loaded, lookup.reason = answer.end_segment, answer.reason
        lookup.from_peers = from_peers
        self._kv.loaded_bytes += from_peers * ROW_BYTES
        lookup.excuse = self._kv.truth.excuse(lookup)
        if answer.end_segment:
            self.leased.add(answer.lookup)
            self._node.later(COPY_MS * answer.end_segment, partial(self._copied, answer.lookup))
        request = f"request {answer.lookup}"
        for start in range(answer.end_segment, len(prompt), STEP_SEGMENTS):
            segments = range(start, min(start + STEP_SEGMENTS, len(prompt)))
            at_ms = (segments.stop - answer.end_segment) * SEGMENT_PREFILL_MS
            self._node.later(at_ms, partial(self._filled, request, segments, prompt))
        over_ms = (len(prompt) - answer.end_segment) * SEGMENT_PREFILL_MS + 1
        self._node.later(over_ms, partial(self._node.submit, RequestOver(self._client, request)))

    def _copied(self, lookup: int) -> None:
        self.leased.discard(lookup)
        self._node.submit(PrefixReleased(lookup))

    def _filled(self, request: str, segments: range, prompt: tuple[SegmentKey, ...]) -> None:
        """A step has filled these segments: a worker stages them, if there is room, and the scheduler names them."""
        for segment in segments:
            if self._node.arena.allocate():
                staged = self._number()
                self._node.staged[staged] = request
                self._node.submit(RowArrived(self._client, request, segment, 0, 0, staged, ROW_BYTES, LAYOUT))
            self._node.submit(SegmentKeyKnown(self._client, request, segment, prompt[segment], LAYOUT, True))

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers
