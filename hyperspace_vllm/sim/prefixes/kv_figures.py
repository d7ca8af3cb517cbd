"""The figures of L2 in one run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .kv_load import SEGMENT_TOKENS
from .sim_lookup import SimLookup


@dataclass(frozen=True, slots=True)
class KvFigures:
    """`lookups` are the prefixes that engines looked up. For `offered` of them an honest peer that could be reached had
    more than the node itself, and had said so 2 s before; `fetched` of these were fetched as far as peers had them.
    The excused (sim_lookup.Excuse) were not, and `share` is that of the fetched among the others. Tokens loaded come
    from peers and from the node itself. `p50_ms` and `p95_ms` are of lookups that fetched something; `bytes_moved` is
    per byte that engines loaded from peers. `found_slow` is how often an honest node found an honest peer too slow.
    """

    lookups: int
    offered: int
    fetched: int
    share: float
    prefill_quicker: int
    link_too_slow: int
    hindered: int
    tokens_wanted: int
    tokens_loaded: int
    p50_ms: int
    p95_ms: int
    bytes_moved: float
    found_slow: int


def kv_figures(lookups: Sequence[SimLookup], payload_bytes: int, loaded_bytes: int, found_slow: int) -> KvFigures:
    """What came of the lookups of a run."""
    answered = [lookup for lookup in lookups if lookup.answered_ms >= 0]
    offered = [lookup for lookup in answered if lookup.promised]
    fetched = sum(lookup.is_fetched for lookup in offered)
    excused = Counter(lookup.excuse for lookup in offered)
    expected = excused[""]  # those that were fetched have no excuse
    took_ms = sorted(lookup.answered_ms - lookup.asked_ms for lookup in answered if lookup.from_peers)
    return KvFigures(
        len(answered),
        len(offered),
        fetched,
        round(fetched / expected, 4) if expected else 1.0,
        excused["prefill_quicker"],
        excused["link_too_slow"],
        excused["hindered"],
        sum(len(lookup.row_ids) for lookup in answered) * SEGMENT_TOKENS,
        sum(lookup.loaded for lookup in answered) * SEGMENT_TOKENS,
        _at(took_ms, 50),
        _at(took_ms, 95),
        round(payload_bytes / loaded_bytes, 3) if loaded_bytes else 0.0,
        found_slow,
    )


def _at(sorted_ms: list[int], percent: int) -> int:
    return sorted_ms[-(-len(sorted_ms) * percent // 100) - 1] if sorted_ms else 0
