"""The machine of one response lookup, by transcripts, and the formula that it calls, by a table.

In a transcript `> ` starts an event, the lines below it are the effects that it must have; time only moves by `at=`.
A, B, C … are providers; `want A B` is a lookup that knows these, `found C` what the DHT says.
"""

import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperspace_vllm.core.events.dht import ProvidersFound, SearchDht
from hyperspace_vllm.core.events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ResponseFetched,
    ResponseRefused,
    ResponseWanted,
)
from hyperspace_vllm.core.events.vocabulary import NetworkEffect
from hyperspace_vllm.core.prefix.cost_model import HEDGE_MS_MAX, HEDGE_MS_MIN
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.response.lookup import (
    ATTEMPTS_MAX,
    DHT_MS,
    IN_FLIGHT_MAX,
    RACE_MS,
    ProviderCandidate,
    ResponseLookup,
    hedge_delay_ms,
)
from tests.support.moments import at

WANTED = b"r" * 32
DEADLINE_MS = 300


def candidates(names: list[str]) -> list[ProviderCandidate]:
    """A name with a plus is of a peer that a connection is open to, one with a question mark of a stranger."""
    return [
        ProviderCandidate(PeerId(name[0]), f"10.0.0.1:{ord(name[0])}", 10.0, name.endswith("+"), not name.endswith("?"))
        for name in names
    ]


class Script:
    """Runs a transcript against one ResponseLookup."""

    def __init__(self, may_search: bool = True) -> None:
        self.may_search = may_search
        self.searches = 0
        self.now_ms = self.set_by_ms = 0
        self.lookup: ResponseLookup

    @property
    def now(self) -> Now:
        return at(self.now_ms, self.set_by_ms)

    def run(self, transcript: str) -> None:
        lines = [line.split("#")[0].rstrip() for line in textwrap.dedent(transcript).strip().splitlines()]
        lines = [line for line in lines if line]
        expected: list[str] = []
        got: list[str] = []
        for line in lines:
            if line.startswith("> "):
                assert got == expected, f"before {line!r}"
                got, expected = self.event(line[2:].split()), []
            else:
                expected.append(line.strip())
        assert got == expected

    def event(self, words: list[str]) -> list[str]:
        if words[0].startswith("at="):
            self.now_ms = int(words.pop(0)[3:])
        match words:
            case ["want", *names]:
                wanted = ResponseWanted(1, WANTED, DEADLINE_MS)
                self.lookup = ResponseLookup(wanted, candidates(names), self._may_search, self.now)
                effects = self.lookup.start(self.now)
            case ["tick"]:
                effects = self.lookup.on_tick(self.now)
            case ["hit", name]:
                effects = self.lookup.on_fetched(ResponseFetched(1, PeerId(name), 1, 1, 1))
            case ["refused", name, reason]:
                effects = self.lookup.on_refused(ResponseRefused(1, PeerId(name), Reason(reason)), self.now)
            case ["found", *names]:
                found = ProvidersFound(1, tuple(PeerId(name) for name in names), 1.0)
                effects = self.lookup.on_providers(found, candidates(names), self.now)
            case _:
                raise ValueError(words)
        return [self.told(effect) for effect in effects]

    def told(self, effect: NetworkEffect) -> str:
        match effect:
            case HintResponse(_, hinted):
                return "hinted" if hinted else "unhinted"
            case FetchResponse(_, peer, _, request_hash, timeout_ms) if request_hash == WANTED:
                return f"fetch {peer} for {timeout_ms}"
            case SearchDht(_, request_hash, timeout_ms) if request_hash == WANTED:
                return f"search for {timeout_ms}"
            case AnswerResponse(_, peer, source, reason):
                return f"answer {peer} {source} {reason}"
            case _:
                raise ValueError(effect)

    def _may_search(self, now: Now) -> bool:
        self.searches += 1
        return self.may_search


def test_the_best_provider_is_asked_and_its_answer_ends_the_lookup() -> None:
    script = Script()
    script.run(
        """
        > want A B
        hinted
        fetch A for 300
        > at=12 hit A
        answer A hint hit
        """
    )
    assert script.lookup.over
    assert not script.searches


def test_a_silent_provider_is_hedged_once_soon_and_once_at_half_time() -> None:
    Script().run(
        """
        > want A B C D
        hinted
        fetch A for 300
        > at=29 tick
        > at=30 tick                # three round trips
        fetch B for 270
        > at=100 tick
        > at=150 tick               # two that keep silent for so long are frozen
        fetch C for 150
        > at=250 tick               # no more than three at once
        > at=260 hit C
        answer C hint hit
        """
    )


def test_who_refuses_makes_room_for_the_next_at_once() -> None:
    Script().run(
        """
        > want A B C D
        hinted
        fetch A for 300
        > at=30 tick
        fetch B for 270
        > at=32 refused B miss      # though A keeps silent still
        fetch C for 268
        > at=33 refused C busy
        fetch D for 267
        > at=40 hit A
        answer A hint hit
        """
    )


def test_whose_connection_breaks_is_asked_once_more_after_the_others() -> None:
    Script().run(
        """
        > want A+ B
        hinted
        fetch A for 300
        > at=5 refused A unreachable    # it has just closed it
        fetch B for 295
        > at=9 refused B unreachable    # nobody is there
        fetch A for 291
        > at=20 refused A unreachable
        unhinted                        # nobody is left to wait for: the engine starts
        search for 1500
        > at=40 found A B
        answer None none unreachable
        """
    )


def test_after_the_last_known_provider_the_dht_is_searched_while_the_engine_computes() -> None:
    Script().run(
        f"""
        > want A
        hinted
        fetch A for 300
        > at=10 refused A miss
        unhinted
        search for {DHT_MS}
        > at=60 found A B           # A has said no already
        fetch B for {RACE_MS - 60}
        > at=70 hit B
        answer B dht hit
        """
    )


def test_strangers_hints_race_the_engine_and_make_no_request_wait() -> None:
    script = Script()
    script.run(
        f"""
        > want A? B?
        unhinted
        fetch A for {RACE_MS}
        > at=30 tick
        fetch B for {RACE_MS - 30}
        > at=40 hit B
        answer B hint hit
        """
    )
    assert script.lookup.waited_ms(at(40)) == {}


def test_a_request_waits_for_those_who_are_worth_it_and_for_strangers_no_longer() -> None:
    script = Script()
    script.run(
        f"""
        > want A B?
        hinted
        fetch A for 300
        > at=30 tick                # B may help, if A is late
        fetch B for 270
        > at=100 refused A miss
        unhinted
        > at={RACE_MS} tick
        answer None none deadline
        """
    )
    assert script.lookup.waited_ms(at(RACE_MS)) == {"A": 100}


def test_what_a_request_waited_for_each_is_known_but_for_who_answered() -> None:
    script = Script()
    script.run(
        """
        > want A B C
        hinted
        fetch A for 300
        > at=30 tick
        fetch B for 270
        > at=40 refused B miss
        fetch C for 260
        > at=90 hit C
        answer C hint hit
        """
    )
    assert script.lookup.waited_ms(at(90)) == {"A": 90, "B": 10}


def test_an_unhinted_lookup_may_take_longer_because_nobody_waits_for_it() -> None:
    script = Script()
    script.run(
        f"""
        > want
        unhinted
        search for {DHT_MS}
        > at=1000 found A
        fetch A for {RACE_MS - 1000}
        > at={RACE_MS} tick
        answer None none deadline
        """
    )
    assert set(script.lookup.in_flight) == {"A"}


def test_what_the_dht_does_not_know_is_a_miss() -> None:
    script = Script()
    script.run(
        """
        > want
        unhinted
        search for 1500
        > at=100 found
        answer None none not_found
        """
    )
    assert script.lookup.searched


def test_a_lookup_that_may_not_search_ends_at_once_and_has_searched_nothing() -> None:
    script = Script(may_search=False)
    script.run(
        """
        > want
        unhinted
        answer None none not_found
        """
    )
    assert not script.lookup.searched


def test_the_budget_is_asked_only_when_a_search_begins() -> None:
    script = Script()
    script.run(
        """
        > want A
        hinted
        fetch A for 300
        > hit A
        answer A hint hit
        """
    )
    assert script.searches == 0


def test_a_hinted_lookup_ends_by_its_deadline() -> None:
    Script().run(
        """
        > want A
        hinted
        fetch A for 300
        > at=299 tick
        > at=300 tick
        answer None none deadline
        """
    )


def test_a_refusal_after_the_deadline_starts_nothing_new() -> None:
    Script().run(
        """
        > want A B
        hinted
        fetch A for 300
        > at=300 refused A busy     # it overtook the tick
        answer None none deadline
        """
    )


def test_the_answer_says_why_the_last_provider_was_refused() -> None:
    Script(may_search=False).run(
        """
        > want A B
        hinted
        fetch A for 300
        > refused A bad_signature
        fetch B for 300
        > refused B miss
        unhinted
        answer None none bad_signature
        """
    )


def test_answers_of_those_who_were_not_asked_change_nothing() -> None:
    Script().run(
        """
        > want A B
        hinted
        fetch A for 300
        > at=1 hit B
        > at=2 refused B miss
        > at=3 found B C            # nobody searched
        > at=4 refused A miss
        fetch B for 296
        > at=5 refused A miss       # twice
        > at=6 hit B
        answer B hint hit
        """
    )


def test_at_most_so_many_providers_are_asked() -> None:
    names = " ".join(chr(ord("A") + index) for index in range(ATTEMPTS_MAX + 3))
    script = Script()
    script.event(["want", *names.split()])
    asked = 1
    for name in names.split():
        effects = script.event(["refused", name, "miss"])
        asked += sum(effect.startswith("fetch") for effect in effects)
        if script.lookup.over:
            break
    assert asked == ATTEMPTS_MAX
    assert script.lookup.over
    assert not script.searches


def test_a_clock_that_is_set_back_takes_nothing_from_the_lookup() -> None:
    script = Script()
    script.run("> at=1000 want A B\nhinted\nfetch A for 300")
    script.set_by_ms = -900
    assert script.lookup.next_deadline_ms() == 1030
    script.run("> at=1030 tick\nfetch B for 270\n> at=1300 tick\nanswer None none deadline")


@pytest.mark.parametrize(
    ("rtt_ms", "delay_ms"), [(0.0, HEDGE_MS_MIN), (5.0, HEDGE_MS_MIN), (20.0, 60), (100.0, HEDGE_MS_MAX)]
)
def test_the_hedge_waits_for_three_round_trips_within_bounds(rtt_ms: float, delay_ms: int) -> None:
    assert hedge_delay_ms(rtt_ms) == delay_ms


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from("ABCDEFGH"), st.integers(0, 4)), max_size=60))
def test_whatever_comes_a_lookup_is_answered_once_in_time_and_never_ticks_in_vain(
    steps: list[tuple[int, str, int]],
) -> None:
    script = Script()
    answers = [effect for effect in script.event(["want", "A+", *"BCDEF"]) if effect.startswith("answer")]
    for delay_ms, name, kind in steps:
        target_ms = script.now_ms + delay_ms
        while not script.lookup.over and (due_ms := script.lookup.next_deadline_ms()) <= target_ms:
            assert due_ms >= script.now_ms
            answers += [e for e in script.event([f"at={due_ms}", "tick"]) if e.startswith("answer")]
            assert script.lookup.over or script.lookup.next_deadline_ms() > due_ms
        if script.lookup.over:
            break
        script.now_ms = target_ms
        word = (
            ["refused", name, ("miss", "unreachable")[kind % 2]]
            if kind < 3
            else ["found", name]
            if kind == 3
            else ["hit", name]
        )
        answers += [effect for effect in script.event(word) if effect.startswith("answer")]
        assert len(script.lookup.in_flight) <= IN_FLIGHT_MAX
        if script.lookup.over:
            break
    if not script.lookup.over:
        answers += script.event([f"at={DEADLINE_MS}", "tick"])
    assert len(answers) == 1
    assert script.now_ms <= DEADLINE_MS
