"""The machine of one lookup, by transcripts, and the formulas that it calls, by tables.

In a transcript `> ` starts an event, the lines below it are the effects that it must have. Rows are numbered in the
order in which they are needed; `0..31` is a range of columns or rows; `m` and `n` are manifests, A, B and C peers.
Time only moves by `now=`.
"""

import textwrap

import pytest

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
from hyperspace_vllm.core.prefix.cost_model import (
    RATE_BYTES_PER_MS_DEFAULT,
    RATE_FORGET_MS,
    RateEstimator,
    fetch_budget_ms,
    hedge_delay_ms,
    least_rate,
    saved_ms,
    search_budget_ms,
    transfer_ms,
    worth_fetching,
)
from hyperspace_vllm.core.prefix.fetch import PrefixLookup
from hyperspace_vllm.core.prefix.plan import assign_columns, needed, rows_of, usable_end
from hyperspace_vllm.core.records.ids import ManifestDigest, PeerId, SegmentKey, network_id
from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import FETCH_STALL_MS, FETCH_UNKNOWN_MS, MiB
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
        self.rows = []
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

    def act(self, command: str) -> list[PrefixEffect]:
        verb, *words = command.split()
        options = dict(word.split("=", 1) for word in words if "=" in word)
        plain = [word for word in words if "=" not in word]
        self.now = int(options.pop("now", self.now))
        self.events += 1
        if verb == "want":
            return self._want(plain, options)
        assert self.lookup is not None
        return self.lookup.handle(self._event(verb, plain, options), self.now)

    def _want(self, peers: list[str], options: dict[str, str]) -> list[PrefixEffect]:
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

    def _event(self, verb: str, plain: list[str], options: dict[str, str]):  # type: ignore[no-untyped-def]
        def keys(name: str) -> list[bytes]:
            return [self.rows[i].key for i in numbers(options.get(name, ""))]

        row = self.rows[int(options["row"])].key if "row" in options else b""
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
                assert self.lookup.next_deadline_ms() is None or self.lookup.next_deadline_ms() <= self.now, (
                    f"not due before {self.lookup.next_deadline_ms()}"
                )
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


# --- formulas -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "rate", "rtt", "expected"), [(0, 1000, 3, 3), (1, 1000, 0, 1), (MiB, MiB / 10, 2, 12)]
)
def test_transfer_time_is_a_round_trip_and_the_bytes(size, rate, rtt, expected):
    assert transfer_ms(size, rate, rtt) == expected


@pytest.mark.parametrize(
    ("estimate", "saves", "expected"), [(50, 100, True), (51, 100, False), (9_999, 0, True), (1, 1, False)]
)
def test_a_fetch_pays_when_it_takes_at_most_half_of_what_it_saves(estimate, saves, expected):
    assert worth_fetching(estimate, saves) is expected


@pytest.mark.parametrize(("prefill", "expected"), [(0, 250), (1, 0), (99, 0), (100, 5), (2_000, 100), (600_000, 1_000)])
def test_looking_for_providers_waits_a_twentieth_of_the_prefill_or_not_at_all(prefill, expected):
    assert search_budget_ms(prefill) == expected


@pytest.mark.parametrize(("expected_ms", "delay"), [(0, 90), (90, 90), (100, 100), (9_999, 125)])
def test_hedging_waits_for_the_expected_transfer_within_bounds(expected_ms, delay):
    assert hedge_delay_ms(expected_ms) == delay


def test_savings_are_proportional_and_unknown_only_where_the_prefill_is():
    assert saved_ms(1000, 256, 1024) == 250
    assert saved_ms(1, 1, 1_000_000) == 1
    assert saved_ms(0, 256, 1024) == 0
    assert fetch_budget_ms(250) == 125


def test_rates_follow_measurements_and_are_forgotten():
    rates, peer = RateEstimator(), PeerId("A")
    assert rates.rate(peer, 0) == RATE_BYTES_PER_MS_DEFAULT
    rates.measured(peer, MiB, MiB, 1000, 0)
    slow = rates.rate(peer, 0)
    assert slow < RATE_BYTES_PER_MS_DEFAULT
    rates.measured(peer, MiB, 0, 1000, 10)
    assert rates.rate(peer, 10) < slow
    rates.measured(PeerId("B"), 1000, 0, 1000, 10)
    assert rates.rate(PeerId("B"), 10) == rates.rate(PeerId("C"), 10)  # too small to say anything
    assert rates.rate(peer, 11 + RATE_FORGET_MS) == RATE_BYTES_PER_MS_DEFAULT


def test_columns_come_lowest_first_from_the_preferred_holder():
    a, b = PeerId("A"), PeerId("B")
    assert assign_columns(3, 0b1, [(a, 0b10101), (b, 0b11111)]) == {b: 0b1010, a: 0b100}
    assert assign_columns(32, 0, [(a, 0b111)]) == {a: 0b111}
    assert assign_columns(0, 0, [(a, 0b111)]) == {}


@pytest.mark.parametrize(
    ("missing", "start", "expected"),
    [
        ((), 0, 6),
        ({(0, 0)}, 0, 0),  # full attention needs the first segment
        ({(0, 0)}, 256, 6),  # unless the engine has it
        ({(4, 0)}, 0, 4),
        ({(0, 1), (1, 1)}, 0, 6),  # a window of 512 reads the last two segments only
        ({(5, 1)}, 0, 5),
        ({(4, 1)}, 0, 4),  # 6 and 5 need it, 4 doesn't
        ({(3, 1), (5, 0)}, 0, 3),
    ],
)
def test_the_longest_usable_prefix_needs_every_full_row_and_the_tail_of_windows(missing, start, expected):
    end = usable_end(MIXED, start, 6, lambda segment, part: (segment, part) not in missing)
    assert end == expected


def test_what_an_end_needs_is_what_makes_it_usable():
    for start in (0, 255, 256, 600):
        for end in range(start // 256 + 1, 7):
            places = set(needed(MIXED, start, end))
            assert usable_end(MIXED, start, end, lambda s, p, places=places: (s, p) in places) == end
            for hole in places:
                rest = places - {hole}
                assert usable_end(MIXED, start, end, lambda s, p, rest=rest: (s, p) in rest) != end


# --- transcripts --------------------------------------------------------------------------------


def test_a_local_prefix_is_loaded_and_answered_without_asking_anybody():
    Script().run("""
        > want A segments=3
        find-rows 3
        > found memory=0,2 disk=1
        load 0  # at once: making room for row 1 must not take what is needed next
        load 2
        load 1
        > ready row=0
        > ready row=2
        > ready row=1
        answer 3 disk hit rows=3
        > ready row=1
    """)


def test_a_prefix_comes_from_a_peer():
    Script().run("""
        > want A segments=2 prefill=2000
        find-rows 2
        > found
        find-providers A rows=2 ms=100
        > offer A m rows=0..1 now=3
        fetch-manifest A m
        > manifest A m rows=0..1 now=8
        fetch A m row=0 0..31
        fetch A m row=1 0..31
        > ready row=0 now=20
        > ready row=1 now=30
        answer 2 network hit rows=2
    """)


def test_what_is_here_already_is_not_fetched():
    Script().run("""
        > want A segments=3 prefill=3000
        find-rows 3
        > found memory=0
        find-providers A rows=2 ms=100
        > offer A m rows=1..2 base=1
        load 0
        fetch-manifest A m
        > ready row=0
        > manifest A m rows=1..2
        fetch A m row=1 0..31
        fetch A m row=2 0..31
        > ready row=1
        > ready row=2
        answer 3 network hit rows=3
    """)


def test_the_search_ends_when_its_share_of_the_prefill_is_spent():
    Script().run("""
        > want A B segments=2 prefill=2000
        find-rows 2
        > found memory=0
        find-providers A B rows=1 ms=50
        > nothing A now=2
        > tick now=50
        load 0
        > ready row=0
        answer 1 memory hit rows=1
    """)
    Script().run("""
        > want A segments=2 prefill=2000
        find-rows 2
        > found
        find-providers A rows=2 ms=100
        > tick now=100
        answer 0 none search_timeout rows=0
    """)


def test_a_frozen_peer_does_not_hold_up_one_who_has_everything():
    Script().run("""
        > want A B segments=1 prefill=2000
        find-rows 1
        > found
        find-providers A B rows=1 ms=100
        > offer B m rows=0 now=2
        fetch-manifest B m
    """)


@pytest.mark.parametrize(
    ("want", "reason"),
    [
        ("A segments=2 scope=private", "local_only"),
        ("A segments=2 fetch=never", "local_only"),
        ("segments=2", "no_peers"),
        ("A segments=2 prefill=99", "too_short"),
    ],
)
def test_nobody_is_asked_where_that_is_forbidden_or_cannot_pay(want, reason):
    Script().run(f"""
        > want {want}
        find-rows 2
        > found
        answer 0 none {reason} rows=0
    """)


def test_a_start_beyond_the_last_segment_is_answered_at_once():
    Script().run("""
        > want A segments=2 start=512
        answer 0 none nothing_beyond rows=0
    """)


def test_a_transfer_that_would_take_too_long_is_not_begun_unless_forced():
    rates = RateEstimator()
    rates.measured(PeerId("A"), MiB, 0, 1000, 0)
    rates.measured(PeerId("A"), MiB, 0, 1000, 0)
    rates.measured(PeerId("A"), MiB, 0, 1000, 0)
    Script(rates=rates).run("""
        > want A segments=2 prefill=300
        find-rows 2
        > found
        find-providers A rows=2 ms=15
        > offer A m rows=0..1
        answer 0 none not_worth rows=0
    """)
    Script(rates=rates).run("""
        > want A segments=2 prefill=300 fetch=always
        find-rows 2
        > found
        find-providers A rows=2 ms=1000
        > offer A m rows=0..1
        fetch-manifest A m
    """)


def test_data_columns_are_preferred_and_put_together_from_several_holders():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 columns=0..15,32..40
        > offer B m rows=0 columns=8..40
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..15
        fetch B m row=0 16..31
        > ready row=0
        answer 1 network hit rows=1
    """)


def test_holders_that_lack_32_columns_between_them_are_a_miss():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 columns=0..15
        > offer B n rows=0 columns=0..30
        answer 0 none not_found rows=0
    """)


@pytest.mark.parametrize(
    ("size", "left_ms", "expected"),
    [(4 * MiB, 1_024, 2_048), (4 * MiB, None, 250), (1, 1_000, 250), (1_000, 0, 500)],
)
def test_a_fetch_must_reach_half_of_the_rate_that_would_end_it_in_time(size, left_ms, expected):
    assert least_rate(size, left_ms) == expected


def test_what_newcomers_deliver_is_expected_of_the_next_newcomer():
    rates = RateEstimator()
    rates.measured(PeerId("proven"), MiB, MiB, 1, 0)
    assert rates.rate(PeerId("new"), 0) == RATE_BYTES_PER_MS_DEFAULT, "a quick newcomer raises nothing"
    expected = [rates.rate(PeerId("new"), 0)]
    for number in range(4):
        rates.measured(PeerId(f"identity {number}"), MiB, MiB, 1000, 0)
        expected.append(rates.rate(PeerId("new"), 0))
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] < RATE_BYTES_PER_MS_DEFAULT / 8
    assert rates.rate(PeerId("proven"), 0) > RATE_BYTES_PER_MS_DEFAULT
    rates.measured(PeerId("proven"), MiB, 0, 1000, 0)
    assert rates.rate(PeerId("new"), 0) == expected[-1], "who is known says nothing of others"
    assert rates.rate(PeerId("new"), 1 + RATE_FORGET_MS) == RATE_BYTES_PER_MS_DEFAULT


def trickle(script: Script, segments: int, every_ms: int) -> list[str]:
    """One column of one row after another comes from A, which is asked for all; how the lookup ends."""
    for command in ("found", f"offer A m rows=0..{segments - 1}", f"manifest A m rows=0..{segments - 1}"):
        script.act(command)
    columns, effects = 0, []
    while not any(isinstance(effect, AnswerPrefix) for effect in effects):
        assert script.lookup is not None
        due_ms, next_ms = script.lookup.next_deadline_ms(), (columns + 1) * every_ms
        if due_ms is not None and due_ms < next_ms:
            effects = script.act(f"tick now={due_ms}")
            continue
        row, column = divmod(columns, 32)
        what = f"chunks A row={row} columns=0..{column}" if column < 31 else f"ready row={row}"
        effects = script.act(f"{what} now={next_ms}")
        columns += 1
    return [script.show(effect) for effect in effects]


def test_a_slow_link_is_no_stall():
    script = Script()
    script.act("want A segments=1 prefill=4000")
    assert trickle(script, 1, 20) == ["answer 1 network hit rows=1"]
    assert script.lookup is not None
    assert script.lookup.waited_ms == {}


def test_a_trickle_of_good_chunks_is_a_stall():
    script = Script()
    script.act("want A segments=1 prefill=4000")
    assert trickle(script, 1, 200) == ["charge A stalled", "answer 0 none stalled rows=0"]
    assert script.now < 4 * FETCH_STALL_MS
    assert script.lookup is not None
    assert script.lookup.waited_ms == {PeerId("A"): script.now}


@pytest.mark.parametrize("prefill", [4_000, 0])
def test_who_is_too_slow_is_charged_and_a_fetch_ends_also_where_no_prefill_was_measured(prefill):
    script = Script()
    script.act(f"want A segments=4 prefill={prefill}")
    assert trickle(script, 4, 30) == ["charge A too_slow", "answer 2 network too_slow rows=2"]
    assert script.now == FETCH_UNKNOWN_MS == fetch_budget_ms(4_000)
    assert script.lookup is not None
    assert script.lookup.waited_ms == {PeerId("A"): FETCH_UNKNOWN_MS}


def test_a_lookup_that_ends_at_its_deadline_accounts_for_who_kept_it_waiting():
    script = Script()
    script.act("want A segments=4 fetch=always deadline=1000")
    assert trickle(script, 4, 30) == ["answer 0 none deadline rows=0"]
    assert script.lookup is not None
    assert script.lookup.waited_ms == {PeerId("A"): 950}


def test_peers_that_are_silent_for_a_whole_search_are_accounted_and_late_ones_of_a_short_search_are_not_blamed():
    for prefill, waits_ms, silent in ((4_000, 200, ["B", "C"]), (1_000, 50, [])):
        script = Script()
        script.act(f"want A B C segments=1 prefill={prefill}")
        script.act("found")
        script.act("nothing A now=3")
        effects = script.act(f"silent B timeout now={waits_ms}")
        assert [script.show(effect) for effect in effects] == ["answer 0 none search_timeout rows=0"]
        assert script.lookup is not None
        assert script.lookup.waited_ms == {PeerId("B"): waits_ms, PeerId("C"): waits_ms}
        assert list(script.lookup.silent) == silent


def test_peers_are_not_blamed_for_a_search_in_which_this_node_did_not_run():
    script = Script()
    for command in ("want A segments=1 prefill=4000", "found", "tick now=400"):  # was due at 200
        script.act(command)
    assert script.lookup is not None
    assert (script.lookup.answered, script.lookup.waited_ms, script.lookup.silent) == (True, {}, {})


def test_a_silence_that_is_reported_late_counts_once():
    script = Script()
    for command in (
        "want A B segments=1 prefill=4000",
        "found",
        "offer A m rows=0 now=3",
        "tick now=200",
        "silent B timeout now=201",
    ):
        script.act(command)
    assert script.lookup is not None
    assert list(script.lookup.silent) == ["B"]


def test_a_slow_row_is_hedged_by_further_columns_of_its_only_holder():
    Script().run("""
        > want A segments=1
        find-rows 1
        > found
        find-providers A rows=1 ms=250
        > offer A m rows=0 now=0
        fetch-manifest A m
        > manifest A m rows=0 now=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0..9 now=30
        > tick now=120
        > tick now=155  # asking the same holder for more may only slow it down
        fetch A m row=0 32..63
        > ready row=0 now=100
        answer 1 network hit rows=1
    """)


def test_a_slow_row_is_hedged_by_another_producers_manifest():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=2
        fetch-manifest A m
        > offer B n rows=0 rtt=9
        > manifest A m rows=0
        fetch A m row=0 0..31
        > tick now=90
        fetch-manifest B n
        > manifest B n rows=0 now=100
        fetch B n row=0 0..31
        > ready row=0 now=110
        answer 1 network hit rows=1
    """)


def test_a_slow_row_is_hedged_by_a_holder_of_the_same_columns():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=2
        fetch-manifest A m
        > offer B m rows=0 rtt=9 columns=0..34
        > manifest A m rows=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0..9 now=2
        > tick now=92
        fetch B m row=0 10..28,32..34
        > ready row=0 now=80
        answer 1 network hit rows=1
    """)


def test_a_slow_manifest_is_asked_of_others_and_then_replaced():
    Script().run("""
        > want A B C segments=1
        find-rows 1
        > found
        find-providers A B C rows=1 ms=250
        > offer A m rows=0 rtt=2
        fetch-manifest A m
        > offer B m rows=0 rtt=3
        > offer C n rows=0 rtt=40
        > tick now=60
        fetch-manifest B m
        > tick now=120
        fetch-manifest C n
        > manifest C n rows=0 now=160
        fetch C n row=0 0..31
        > ready row=0 now=220
        answer 1 network hit rows=1
    """)


def test_a_stall_falls_back_to_what_is_ready_or_here():
    Script().run("""
        > want A segments=4
        find-rows 4
        > found memory=0,2
        find-providers A rows=2 ms=250
        > offer A m rows=1,3 columns=0..31
        load 0
        load 2
        fetch-manifest A m
        > ready row=0
        > ready row=2
        > manifest A m rows=0..3 now=10
        fetch A m row=1 0..31
        fetch A m row=3 0..31
        > ready row=1 now=50
        > tick now=140
        > tick now=175
        > tick now=300
        charge A stalled
        answer 3 network stalled rows=3
    """)


def test_a_prefix_longer_than_the_room_is_cut_where_the_room_ends():
    Script().run(f"""
        > want A segments=4
        find-rows 4
        > found memory=1,3 disk=0,2 leased=1 room={2 * MiB}
        load 1  # leased by others: it costs nothing
        load 0
        load 2
        > ready row=1
        > ready row=0
        > ready row=2
        answer 3 disk arena_full rows=3
    """)


def test_a_window_takes_room_for_its_tail_alone():
    # rows: 2i is segment i of the full part, 2i + 1 of the window; an end needs the last two window rows
    Script(MIXED).run(f"""
        > want A segments=6
        find-rows 12
        > found disk=0..11 room={5 * MiB}
        load 0
        load 2
        load 3
        load 4
        load 5
        > ready row=0
        > ready row=2
        > ready row=3
        > ready row=4
        > ready row=5
        answer 3 disk arena_full rows=5
    """)


def test_a_row_without_a_gap_costs_the_end_of_the_prefix_not_all_of_it():
    Script().run("""
        > want A segments=3
        find-rows 3
        > found memory=1,2 disk=0
        load 1
        load 2
        load 0
        > ready row=1
        > ready row=2
        > failed arena_full row=0
        release 2
        load 0
        > ready row=0
        answer 2 disk arena_full rows=2
    """)


def test_a_fetched_row_without_a_gap_makes_do_with_what_is_under_way():
    Script().run("""
        > want A segments=3
        find-rows 3
        > found
        find-providers A rows=3 ms=250
        > offer A m rows=0..2 now=3
        fetch-manifest A m
        > manifest A m rows=0..2 now=8
        fetch A m row=0 0..31
        fetch A m row=1 0..31
        fetch A m row=2 0..31
        > failed arena_full row=1
        release 2
        fetch A m row=1 0..31
        > ready row=2 now=9
        release 2
        > ready row=0
        > ready row=1
        answer 2 network arena_full rows=2
    """)


def test_a_lookup_that_finds_no_room_holds_nothing_and_looks_again_for_a_moment():
    script = Script()
    script.run(f"""
        > want A segments=2
        find-rows 2
        > found disk=0,1 room=0
        > tick now=20
        find-rows 2
        > found memory=0 disk=1 room={MiB} now=21
        load 0
        > ready row=0
        answer 1 memory arena_full rows=1
    """)
    Script().run("""
        > want A segments=1 prefill=100
        find-rows 1
        > found disk=0 room=0
        > tick now=20
        find-rows 1
        > found disk=0 room=0
        > tick now=40
        find-rows 1
        > found disk=0 room=0
        > tick now=50  # half of the prefill is over
        find-rows 1
        > found disk=0 room=0
        answer 0 none arena_full rows=0
    """)


def test_what_peers_have_waits_for_room_too_and_is_no_reason_to_keep_less():
    Script().run(f"""
        > want A segments=2
        find-rows 2
        > found room=0
        find-providers A rows=2 ms=250
        > offer A m rows=0..1 now=3
        > tick now=23
        find-rows 2
        > found room={MiB}
        fetch-manifest A m
        > manifest A m rows=0..1
        fetch A m row=0 0..31
        > ready row=0
        answer 1 network arena_full rows=1
    """)
    Script().run(f"""
        > want A segments=2
        find-rows 2
        > found disk=0 room={MiB}
        find-providers A rows=1 ms=250
        > offer A m rows=1 now=3
        load 0
        > ready row=0
        answer 1 disk hit rows=1
    """)


def test_a_retreat_loads_the_window_rows_that_the_shorter_prefix_needs():
    # rows: 2i is segment i of the full part, 2i + 1 of the window; an end needs the last two window rows
    Script(MIXED).run("""
        > want A segments=5
        find-rows 10
        > found memory=0..5
        find-providers A rows=4 ms=250
        > offer A m rows=6..9
        load 0
        load 2
        load 4
        fetch-manifest A m
        > ready row=0
        > ready row=2
        > ready row=4
        > refused A m untrusted_producer
        load 3
        load 5
        > ready row=3
        > ready row=5
        answer 3 memory failed rows=5
    """)


def test_the_budget_of_a_fetch_is_half_of_what_it_saves():
    Script().run("""
        > want A segments=1 prefill=400
        find-rows 1
        > found
        find-providers A rows=1 ms=20
        > offer A m rows=0 columns=0..31
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0 now=100
        > tick now=190
        > tick now=200
        answer 0 none too_slow rows=0
    """)


def test_time_in_which_this_node_did_not_run_is_nobodys_stall():
    Script().run("""
        > want A segments=1
        find-rows 1
        > found
        find-providers A rows=1 ms=250
        > offer A m rows=0 columns=0..31
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..31
        > tick now=290  # was due at 90
        > chunks A row=0 columns=0..20 now=291
        > tick now=900  # was due at 381; 50 ms may still be forgiven
        charge A stalled
        answer 0 none stalled rows=0
    """)


def test_the_deadline_is_kept_whatever_happens():
    Script().run("""
        > want A segments=2 deadline=100
        find-rows 2
        > found memory=0
        find-providers A rows=1 ms=90
        > offer A m rows=1 base=1
        load 0
        fetch-manifest A m
        > ready row=0 now=20
        > tick now=60
        > tick now=90
        answer 1 memory deadline rows=1
    """)


def test_garbage_is_charged_and_its_sender_not_asked_again():
    Script().run("""
        > want A B segments=2
        find-rows 2
        > found
        find-providers A B rows=2 ms=250
        > offer A m rows=0..1 rtt=1
        fetch-manifest A m
        > offer B m rows=0..1 rtt=40
        > manifest A m rows=0..1
        fetch A m row=0 0..31
        fetch A m row=1 0..31
        > chunks A row=0 columns=0..3 now=5
        > stalled A bad_digest row=0 now=6
        charge A bad_digest
        fetch B m row=0 4..31
        fetch B m row=1 0..31
        > ready row=0 now=20
        > ready row=1 now=30
        answer 2 network hit rows=2
    """)


def test_columns_that_a_holder_lacks_are_replaced_by_others():
    Script().run("""
        > want A segments=1
        find-rows 1
        > found
        find-providers A rows=1 ms=250
        > offer A m rows=0
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0..27
        > stalled A not_here row=0
        fetch A m row=0 32..35
        > stalled A not_here row=0
        fetch A m row=0 36..39
        > ready row=0
        answer 1 network hit rows=1
    """)


def test_too_many_lost_columns_are_a_miss_at_once():
    Script().run("""
        > want A segments=1
        find-rows 1
        > found
        find-providers A rows=1 ms=250
        > offer A m rows=0 columns=0..32
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0..29
        > stalled A not_here row=0
        answer 0 none failed rows=0
    """)


@pytest.mark.parametrize("lie", ["rows=1", "rows=0 length=9", "rows=0 fingerprint=g", "rows=0 chunk=4194560"])
def test_an_offer_that_its_manifest_contradicts_is_charged(lie):
    Script().run(f"""
        > want A B segments=2
        find-rows 2
        > found memory=1
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=1
        load 1
        fetch-manifest A m
        > offer B n rows=0 rtt=9
        > manifest A m {lie}
        charge A false_offer
        fetch-manifest B n
    """)


def test_a_false_tag_is_charged_to_the_producer_and_not_to_who_offers_the_manifest():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0
        fetch-manifest A m
        > offer B n rows=0
        > refused A m bad_tag producer=P
        charge P bad_tag
        fetch-manifest B n
        > refused B n bad_tag producer=B
        charge B bad_tag
        answer 0 none failed rows=0
    """)


def test_a_refused_manifest_is_asked_of_the_next_who_offers_it():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0
        fetch-manifest A m
        > offer B m rows=0
        > refused A m forged
        charge A forged
        fetch-manifest B m
        > manifest B m rows=0
        fetch B m row=0 0..31
        > ready row=0
        answer 1 network hit rows=1
    """)


def test_a_condemned_object_is_given_up_for_another():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=1
        fetch-manifest A m
        > offer B n rows=0 rtt=9
        > manifest A m rows=0
        fetch A m row=0 0..31
        > failed condemned row=0
        fetch-manifest B n
        > manifest B n rows=0
        fetch B n row=0 0..31
        > failed condemned row=0
        answer 0 none failed rows=0
    """)


def test_a_manifest_that_raced_with_a_condemned_one_is_asked_again():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=1
        fetch-manifest A m
        > offer B n rows=0 rtt=9
        > manifest A m rows=0
        fetch A m row=0 0..31
        > tick now=90
        fetch-manifest B n
        > manifest B n rows=0 now=100
        fetch B n row=0 0..31
        > chunks A row=0 columns=0..31 now=110
        > failed condemned row=0
        fetch B n row=0 0..31
        > ready row=0 now=120
        answer 1 network hit rows=1
    """)


def test_rows_that_the_first_holder_cannot_complete_wait_for_peers_that_may_still_answer():
    Script().run("""
        > want A B segments=2 prefill=10000
        find-rows 2
        > found
        find-providers A B rows=2 ms=500
        > offer A m rows=0..1 now=2
        fetch-manifest A m
        > refused A m forged now=5
        charge A forged
        > offer B n rows=0..1 now=40
        fetch-manifest B n
        > manifest B n rows=0..1
        fetch B n row=0 0..31
        fetch B n row=1 0..31
        > ready row=0
        > ready row=1
        answer 2 network hit rows=2
    """)
    Script().run("""
        > want A B segments=2 prefill=2000
        find-rows 2
        > found memory=0
        find-providers A B rows=1 ms=50
        > offer A m rows=1 now=2
        load 0
        fetch-manifest A m
        > ready row=0 now=3
        > refused A m forged now=5
        charge A forged
        > tick now=50
        answer 1 memory failed rows=1
    """)


def test_a_full_arena_ends_the_fetch():
    Script().run("""
        > want A segments=2
        find-rows 2
        > found
        find-providers A rows=2 ms=250
        > offer A m rows=0..1
        fetch-manifest A m
        > manifest A m rows=0..1
        fetch A m row=0 0..31
        fetch A m row=1 0..31
        > ready row=0
        > failed arena_full row=1
        answer 1 network arena_full rows=1
    """)


def test_a_local_row_that_was_evicted_shortens_the_prefix():
    Script().run("""
        > want segments=3
        find-rows 3
        > found memory=0..2
        load 0
        load 1
        load 2
        > ready row=0
        > failed evicted row=1
        answer 1 memory evicted rows=1
    """)


def test_a_holder_of_all_rows_is_asked_for_a_bounded_number_at_once():
    script = Script()
    script.run("""
        > want A segments=64
        find-rows 64
        > found
        find-providers A rows=64 ms=250
    """)
    script.run("""
        > offer A m rows=0..31
        fetch-manifest A m
    """)
    effects = script.act("manifest A m rows=0..31")
    assert len([e for e in effects if isinstance(e, FetchRow)]) == 16
    assert [script.show(e) for e in script.act("ready row=0")] == ["fetch A m row=16 0..31"]


def test_64_mib_take_at_most_200_events():
    """With the driver's contract at its worst: two ChunksVerified and a RowReady a row of 1 MiB."""
    script = Script()
    effects = [*script.act("want A segments=64"), *script.act("found")]
    offers = tuple(
        RowOffer(row.id, manifest("mn"[i // 32])[:32], i % 32, mask("0..63")) for i, row in enumerate(script.rows)
    )
    assert script.lookup is not None
    effects += script.lookup.handle(ProviderAnswered(1, PeerId("A"), offers, 2), 0)
    script.events += 1
    answer: AnswerPrefix | None = None
    while effects:
        effect = effects.pop(0)
        match effect:
            case FetchManifest():
                rows = "0..31" if effect.manifest == manifest("m") else "32..63"
                effects += script.act(f"manifest A {effect.manifest[:1].decode()} rows={rows}")
            case FetchRow():
                row = script.numbers[effect.row_key]
                effects += script.act(f"chunks A row={row} columns=0..15")
                effects += script.act(f"chunks A row={row} columns=0..30")
                effects += script.act(f"ready row={row}")
            case AnswerPrefix():
                answer = effect
    assert answer is not None
    assert (answer.end_segment, answer.reason) == (64, "hit")
    assert script.events <= 200
