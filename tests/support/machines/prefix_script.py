"""One prefix lookup, driven by a transcript.

In a transcript `> ` starts an event, the lines below it are the effects that it must have. Rows are numbered in the
order in which they are needed; `0..31` is a range of columns or rows; `m` and `n` are manifests, A, B and C peers.
Time only moves by `at=`.
"""

import textwrap

from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.prefix_reading import (
    AnswerPrefix,
    ChunksVerified,
    FetchManifest,
    FetchRow,
    FindRowHolders,
    FindRows,
    HolderStalled,
    LoadRow,
    ManifestRefused,
    ManifestVerified,
    PrefixWanted,
    ProviderAnswered,
    ProviderFailed,
    ReleaseRows,
    RowFailed,
    RowOffer,
    RowReady,
    RowsFound,
)
from hyperspace_vllm.core.events.vocabulary import PrefixEffect
from hyperspace_vllm.core.prefix.cost_model import RateEstimator
from hyperspace_vllm.core.prefix.fetch import LookupEvent, PrefixLookup
from hyperspace_vllm.core.prefix.plan import Row, rows_of
from hyperspace_vllm.core.records.ids import ManifestDigest, PeerId, RowKey, SegmentKey, network_id
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import MiB
from hyperspace_vllm.core.records.manifest import chunk_bytes_for
from hyperspace_vllm.core.records.reason import Reason

NETWORK = network_id("test")
FULL = Layout(b"f" * 32, 256, (Part(0, MiB),), 1)
MIXED = Layout(b"f" * 32, 256, (Part(0, MiB), Part(512, MiB)), 1)
KEYS = tuple(SegmentKey(bytes([i]) * 32) for i in range(128))


class Script:
    """Runs a transcript against one PrefixLookup."""

    def __init__(self, layout: Layout = FULL, rates: RateEstimator | None = None) -> None:
        self.layout = layout
        self.rates = rates or RateEstimator()
        self.now = 0
        self.lookup: PrefixLookup | None = None
        self.numbers: dict[bytes, int] = {}
        self.rows: list[Row] = []
        self.events = 0

    def run(self, transcript: str) -> None:
        lines = [line.split("#")[0].rstrip() for line in textwrap.dedent(transcript).strip().splitlines()]
        turns: list[tuple[str, list[str]]] = []
        for line in (line for line in lines if line):
            if line.startswith("> "):
                turns.append((line[2:], []))
            else:
                turns[-1][1].append(line.strip())
        for command, expected in turns:
            effects = [self.show(effect) for effect in self.act(command)]
            assert effects == expected, f"after `{command}`"

    def play(self, event: str) -> list[str]:
        """The effects of an event of a transcript, each as a line."""
        if event == "waited":
            assert self.lookup is not None
            return [f"{peer} {ms}" for peer, ms in sorted(self.lookup.waited_ms.items())]
        return [self.show(effect) for effect in self.act(event)]

    def act(self, command: str) -> list[PrefixEffect]:
        words = command.split()
        if words[0].startswith("at="):
            self.now = int(words.pop(0)[3:])
        verb, *words = words
        options = dict(word.split("=", 1) for word in words if "=" in word)
        plain = [word for word in words if "=" not in word]
        self.events += 1
        if verb == "want":
            return self._want(plain, options)
        assert self.lookup is not None
        return self.lookup.handle(self._event(verb, plain, options), self.now)

    def _want(self, peers: list[str], options: dict[str, str]) -> list[PrefixEffect]:
        if options.get("layout") == "mixed":
            self.layout = MIXED
        wanted = PrefixWanted(
            1,
            self.layout,
            KEYS[: int(options["segments"])],
            int(options.get("start", 0)),
            int(options.get("prefill", 0)),
            int(options.get("deadline", 10_000)),
            options.get("scope") != "private",
        )
        self.rows = list(rows_of(NETWORK, self.layout, wanted.segment_keys, wanted.start_token).values())
        self.numbers = {row.key: number for number, row in enumerate(self.rows)}
        mode = options.get("fetch", "auto")
        names = tuple(PeerId(peer) for peer in peers)
        self.lookup = PrefixLookup(wanted, NETWORK, names, mode, self.rates, self.now)  # type: ignore[arg-type]
        return self.lookup.start(self.now)

    def _event(self, verb: str, plain: list[str], options: dict[str, str]) -> LookupEvent | Tick:
        def keys(name: str) -> list[RowKey]:
            return [self.rows[i].key for i in numbers(options.get(name, ""))]

        row = self.rows[int(options["row"])].key if "row" in options else RowKey(b"")
        peer = PeerId(plain[0]) if plain else PeerId("")
        match verb:
            case "found":
                memory, disk = frozenset(keys("memory")), frozenset(keys("disk"))
                return RowsFound(1, memory, disk, frozenset(keys("leased")), int(options.get("room", 1 << 62)))
            case "offer":
                columns = mask(options.get("columns", "0..63"))
                base = int(options.get("base", 0))
                offers = tuple(
                    RowOffer(self.rows[i].id, manifest(plain[1]), i - base, columns) for i in numbers(options["rows"])
                )
                return ProviderAnswered(1, peer, offers, int(options.get("rtt", 2)))
            case "nothing":
                return ProviderAnswered(1, peer, (), 2)
            case "silent":
                return ProviderFailed(1, peer, Reason(plain[1]))
            case "manifest":
                chosen = [self.rows[i] for i in numbers(options["rows"])]
                return ManifestVerified(
                    1,
                    peer,
                    manifest(plain[1]),
                    options.get("fingerprint", "f").encode() * 32,
                    tuple(r.id for r in chosen),
                    tuple(int(options.get("length", r.length)) for r in chosen),
                    int(options.get("chunk", chunk_bytes_for(chosen[0].length))),
                )
            case "refused":
                producer = PeerId(options["producer"]) if "producer" in options else None
                return ManifestRefused(1, peer, manifest(plain[1]), Reason(plain[2]), producer)
            case "chunks":
                return ChunksVerified(1, row, peer, mask(options["columns"]))
            case "stalled":
                return HolderStalled(1, row, peer, Reason(plain[1]))
            case "ready":
                return RowReady(1, row)
            case "failed":
                return RowFailed(1, row, plain[0])
            case "tick":
                assert self.lookup is not None
                due_ms = self.lookup.next_deadline_ms()
                assert due_ms is None or due_ms <= self.now, f"not due before {due_ms}"
                return Tick()
        raise AssertionError(verb)

    def show(self, effect: PrefixEffect) -> str:
        match effect:
            case FindRows():
                return f"find-rows {len(effect.row_keys)}"
            case LoadRow():
                return f"load {self.numbers[effect.row_key]}"
            case ReleaseRows():
                return f"release {','.join(str(self.numbers[key]) for key in effect.row_keys)}"
            case FindRowHolders():
                return f"find-providers {' '.join(effect.peers)} rows={len(effect.row_ids)} ms={effect.timeout_ms}"
            case FetchManifest():
                return f"fetch-manifest {effect.peer} {effect.manifest[:1].decode()}"
            case FetchRow():
                name = effect.manifest[:1].decode()
                return f"fetch {effect.peer} {name} row={self.numbers[effect.row_key]} {spans(effect.columns)}"
            case AnswerPrefix():
                return f"answer {effect.end_segment} {effect.source} {effect.reason} rows={len(effect.rows)}"
            case ChargePeer():
                return f"charge {effect.peer} {effect.reason}"
        raise AssertionError(effect)


def numbers(text: str) -> list[int]:
    result: list[int] = []
    for span in filter(None, text.split(",")):
        first, _, last = span.partition("..")
        result += range(int(first), int(last or first) + 1)
    return result


def mask(text: str) -> int:
    return sum(1 << column for column in numbers(text))


def spans(columns: int) -> str:
    found, text = [c for c in range(64) if columns >> c & 1], []
    while found:
        run = 1
        while run < len(found) and found[run] == found[0] + run:
            run += 1
        text.append(f"{found[0]}..{found[run - 1]}" if run > 1 else str(found[0]))
        found = found[run:]
    return ",".join(text)


def manifest(name: str) -> ManifestDigest:
    return ManifestDigest(name.encode() * 32)
