"""An engine's lookup of a prefix in a simulation, from the question to what came of it."""

from dataclasses import dataclass, field
from typing import Literal

from ...core.records.ids import RowId

Excuse = Literal[
    "",  # none
    "prefill_quicker",  # the cost model's verdict: peers had answered, and nothing was asked of them
    "link_too_slow",  # no peer answers within the search's budget, or its link can't bring it within the fetch's
    "hindered",  # those who had it, or those who were asked, were gone, frozen, cut off or liars, or segments were lost
]


@dataclass(slots=True, eq=False)
class SimLookup:
    """Counts are of segments from the prompt's beginning. Times are virtual, -1: not yet."""

    host: int
    life: int  # the host's
    number: int
    row_ids: tuple[RowId, ...]
    asked_ms: int
    local: int  # in the host's memory or on its disk
    promised: tuple[tuple[int, ...], ...]  # of each segment beyond: honest hosts that said so and could be reached
    answered_ms: int = -1
    loaded: int = 0
    from_peers: int = 0  # rows of the answer that peers sent for this lookup
    reason: str = ""
    offered: set[RowId] = field(default_factory=set)  # by peers that answered in time
    asked: dict[int, None] = field(default_factory=dict)  # hosts that were asked for manifests or chunks; -1: none
    excuse: Excuse = ""

    @property
    def promised_end(self) -> int:
        """How far the prefix reached that peers had."""
        return self.local + len(self.promised)

    @property
    def is_fetched(self) -> bool:
        """Whether the engine got as much as peers had."""
        return self.loaded >= self.promised_end
