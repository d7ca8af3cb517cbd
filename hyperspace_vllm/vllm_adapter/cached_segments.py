"""Which segments vLLM's own KV cache holds in full: those that were computed, minus those that vLLM's KV events remove.

Context: vLLM's events name blocks by hashes of its own, and lack what a SegmentKey is made of (files of the adapter,
hashes of media, the tenant). Choice: the scheduler's side, which knows the keys of its requests, notes a segment once
the pool has all its blocks; BlockRemoved and AllBlocksCleared remove it. BlockStored then adds nothing. Rejected: a
publisher of our own, which would encode every token once more and could lose events. Cost: vLLM may drop one of two
copies of a block, and its segment then counts as gone until the next request that has it.

The events are read once a step, in the queue where they wait for vLLM, and stay there: a publisher that the operator
has configured gets them all.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, KVCacheEvent

from ..core.records.ids import SegmentKey
from ..core.records.limits import VRAM_SEGMENTS_MAX
from . import compat
from .kv_layout import KVPlan

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash


@dataclass(slots=True, eq=False)
class _Segment:
    key: SegmentKey
    parent: SegmentKey | None
    blocks: tuple[tuple[int, bytes | int], ...]  # group, vLLM's hash in the form its events use
    ends_here: bool  # the windows before its end are there: a request could continue from there


class CachedSegments:
    """The segments of one engine's KV cache. Two threads may call its methods; only the scheduler's calls `note`."""

    def __init__(self, plan: KVPlan, pool: "BlockPool") -> None:
        self._pool = pool
        self._as_numbers = compat.events_spell_hashes_as_numbers()
        self._tokens = plan.segment_tokens
        self._windowed = frozenset(slot.group for part in plan.parts if part.window_tokens for slot in part.layers)
        self._groups = tuple((part, group) for part in plan.parts for group in sorted({s.group for s in part.layers}))
        self._segments: OrderedDict[SegmentKey, _Segment] = OrderedDict()
        self._holding: dict[tuple[int, bytes | int], _Segment] = {}  # block -> the segment that it is part of
        self._lock = threading.Lock()
        self._queue: list[KVCacheEvent] = []  # vLLM's, as of the last read
        self._seen = 0
        self._changed = False

    def note(self, keys: Sequence[SegmentKey], first: int, block_hashes: Sequence["BlockHash"]) -> int:
        """Take in the segments from number `first` of a prompt with these keys, until one isn't in the pool.

        Returns the number of that segment, or of the first that has no key yet.
        """
        with self._lock:
            self._read_queue()  # a block that was removed may have come back meanwhile
            for number in range(first, len(keys)):
                segment = self._segments.get(keys[number])
                if segment is None:
                    segment = self._look(keys, number, block_hashes)
                    if segment is None:
                        return number
                    self._add(segment)
                elif not segment.ends_here and self._has_windows(number, block_hashes):
                    segment.ends_here = self._changed = True
                self._segments.move_to_end(segment.key)
        return len(keys)

    def look(self) -> None:
        """Read the events that have come since the last look."""
        with self._lock:
            self._read_queue()

    def clear(self) -> None:
        """Forget every segment: nothing in the cache is valid for later requests."""
        with self._lock:
            self._clear()

    def present(self) -> frozenset[SegmentKey] | None:
        """The segments that a request could find, if they changed since the last call; None if not.

        With sliding windows vLLM keeps the end of what it computed, and soon drops the windows in between: a segment
        counts when a request could continue from its end, or from the end of a segment that follows it.
        """
        with self._lock:
            if not self._changed:
                return None
            self._changed = False
            found: set[SegmentKey] = set()
            for segment in self._segments.values():
                link = segment if segment.ends_here else None
                while link is not None and link.key not in found:
                    found.add(link.key)
                    link = self._segments.get(link.parent) if link.parent is not None else None
            return frozenset(found)

    # --- events ---------------------------------------------------------------------------------

    def _read_queue(self) -> None:
        queue = compat.kv_event_queue(self._pool)
        if queue is not self._queue:
            self._read(self._queue[self._seen :])  # what had arrived when vLLM took the list
            self._queue, self._seen = queue, 0
        if len(queue) > self._seen:
            new = queue[self._seen :]
            self._seen += len(new)
            self._read(new)

    def _read(self, events: list[KVCacheEvent]) -> None:
        for event in events:
            if isinstance(event, BlockRemoved):
                for block_hash in event.block_hashes:
                    self._removed(event.group_idx or 0, block_hash)
            elif isinstance(event, AllBlocksCleared):
                self._clear()

    def _removed(self, group: int, block_hash: bytes | int) -> None:
        segment = self._holding.get((group, block_hash))
        if segment is None:
            return
        if group in self._windowed:
            segment.ends_here, self._changed = False, True
        else:
            self._drop(segment)

    # --- the pool -------------------------------------------------------------------------------

    def _look(self, keys: Sequence[SegmentKey], number: int, block_hashes: Sequence["BlockHash"]) -> _Segment | None:
        """The segment, if the pool has what every request needs of it; None otherwise."""
        blocks = self._blocks(number, block_hashes, windows=False)
        if blocks is None or not all(self._has(group, each) for group, each in blocks):
            return None
        windows = self._blocks(number, block_hashes, windows=True) or ()
        ends_here = all(self._has(group, each) for group, each in windows)
        if not blocks and not ends_here:
            return None  # only windows: nothing else shows that it is there
        named: tuple[tuple[int, bytes | int], ...] = (*blocks, *windows)
        if self._as_numbers:
            named = tuple((group, compat.event_number(each)) for group, each in (*blocks, *windows))
        return _Segment(keys[number], keys[number - 1] if number else None, named, ends_here)

    def _has_windows(self, number: int, block_hashes: Sequence["BlockHash"]) -> bool:
        return all(self._has(group, each) for group, each in self._blocks(number, block_hashes, windows=True) or ())

    def _has(self, group: int, block_hash: "BlockHash") -> bool:
        return self._pool.get_cached_block(block_hash, [group]) is not None

    def _blocks(
        self, number: int, block_hashes: Sequence["BlockHash"], windows: bool
    ) -> tuple[tuple[int, "BlockHash"], ...] | None:
        """Group and hash of a segment's blocks in full attention, or of those in its last windows; None if unknown."""
        start, end = number * self._tokens, (number + 1) * self._tokens
        size = self._pool.hash_block_size  # a block's hash is that of the last of these runs in it
        if end // size > len(block_hashes):
            return None
        return tuple(
            (group, block_hashes[(block + 1) * part.block_tokens // size - 1])
            for part, group in self._groups
            if bool(part.window_tokens) == windows
            for block in range(max(start // part.block_tokens, part.first_needed_block(end)), end // part.block_tokens)
        )

    # --- the table ------------------------------------------------------------------------------

    def _add(self, segment: _Segment) -> None:
        if len(self._segments) >= VRAM_SEGMENTS_MAX:
            self._drop(next(iter(self._segments.values())))
        self._segments[segment.key] = segment
        self._holding.update(dict.fromkeys(segment.blocks, segment))
        self._changed = True

    def _drop(self, segment: _Segment) -> None:
        del self._segments[segment.key]
        for block in segment.blocks:
            if self._holding.get(block) is segment:
                del self._holding[block]
        self._changed = True

    def _clear(self) -> None:
        self._changed = self._changed or bool(self._segments)
        self._segments.clear()
        self._holding.clear()
