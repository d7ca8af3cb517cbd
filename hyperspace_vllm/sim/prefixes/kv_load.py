"""What KV weighs in a simulation, how fast engines and nodes work on it, and which prompts clients have.

The model is a small one: 12 KiB of KV a token, and an engine that prefills a token a millisecond. So a segment of 256
tokens takes 256 ms to compute, and 25 ms to send over a link of 1 Gbit/s. Prompts are turns of conversations: a few
openings (system prompts) that many conversations share, then what the conversation has said so far.
"""

import random
from bisect import bisect
from itertools import accumulate

from ...core.records.ids import SegmentKey, sha256
from ...core.records.layout import Layout, Part
from ...core.records.limits import KiB
from ...core.records.manifest import chunk_bytes_for

SEGMENT_TOKENS = 256
TOKEN_KV_BYTES = 12 * KiB  # of all layers
ROW_BYTES = SEGMENT_TOKENS * TOKEN_KV_BYTES  # 3 MiB
CHUNK_BYTES = chunk_bytes_for(ROW_BYTES)
LAYOUT = Layout(sha256(b"a simulated KV fingerprint"), SEGMENT_TOKENS, (Part(0, ROW_BYTES),), 1)
SEGMENT_PREFILL_MS = 256
STEP_SEGMENTS = 8  # 2,048 tokens: rows of one step of the engine are staged together
DEADLINE_MS = 5_000  # of a lookup; what it saves bounds it earlier
COPY_MS = 1  # a row, from the arena into the engine's blocks

ARENA_ROWS = 160  # 480 MiB
LOAD_MS = 6  # a row: read from the disk, checked and opened
OPEN_MS = 4  # a row: the last chunks checked, the row opened into the arena
KZG_MS = 12  # a manifest's commitment, checked in a process of its own
ENCODE_ROW_MS = 25  # sealed, coded, hashed and written, at nice 10
COMMIT_MS = 60  # an object's commitment
WRITE_MS = 250  # the chunks of fetched rows, those of one object together

OPENINGS = 4
OPENING_SEGMENTS = 4
TURN_SEGMENTS = 2
TURNS_MAX = 5  # so prompts have 6 to 14 segments, 1.5 to 3.6 k tokens
CONVERSATIONS_PER_HOST = 2
FIRST_PROMPT_MS = 4_000
PROMPT_EVERY_MS = 4_000  # of a host's clients, on average
LAST_PROMPTS_MS = 12_000  # before the end there are none, so that everything comes to its end


class Conversations:
    """Every conversation of a simulation; the first is asked for most (Zipf)."""

    def __init__(self, count: int) -> None:
        self._weights = list(accumulate(1 / (rank + 1) for rank in range(count)))
        self._keys: dict[int, tuple[SegmentKey, ...]] = {}

    def prompt(self, rng: random.Random) -> tuple[SegmentKey, ...]:
        """The segments of a conversation up to one of its turns."""
        number = bisect(self._weights, rng.random() * self._weights[-1])
        turns = rng.randint(1, TURNS_MAX)
        return self.keys(number)[: OPENING_SEGMENTS + turns * TURN_SEGMENTS]

    def keys(self, number: int) -> tuple[SegmentKey, ...]:
        """All segments of conversation `number`."""
        if number not in self._keys:
            opening = [f"opening/{number % OPENINGS}/{segment}" for segment in range(OPENING_SEGMENTS)]
            said = [f"said/{number}/{segment}" for segment in range(TURNS_MAX * TURN_SEGMENTS)]
            self._keys[number] = tuple(accumulate(opening + said, _next_key, initial=SegmentKey(bytes(32))))[1:]
        return self._keys[number]


def _next_key(previous: SegmentKey, text: str) -> SegmentKey:
    return SegmentKey(sha256(previous, text.encode()))
