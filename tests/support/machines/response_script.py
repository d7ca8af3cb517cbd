"""One response lookup, driven by a transcript.

A, B, C … are providers; `want A B` is a lookup that knows these, `found C` what the DHT says. `want shared` reads the
shared store first, until `shared hit` or `miss A B`, after which it knows these. A name with a plus is of a peer that a
connection is open to, one with a question mark of a stranger.
"""

import textwrap

from hyperspace_vllm.core.events.dht import SearchDht
from hyperspace_vllm.core.events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ReadShared,
    ResponseFetched,
    ResponseRefused,
    ResponseWanted,
)
from hyperspace_vllm.core.events.vocabulary import NetworkEffect
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.core.response.lookup import (
    ProviderCandidate,
    ResponseLookup,
)
from tests.support.moments import at

WANTED = b"r" * 32
DEADLINE_MS = 300
WANT = ResponseWanted(1, WANTED, DEADLINE_MS)


def candidates(names: list[str]) -> list[ProviderCandidate]:
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

    def play(self, event: str) -> list[str]:
        """The effects of an event of a transcript, each as a line."""
        if event == "waited":
            return [f"{peer} {ms}" for peer, ms in sorted(self.lookup.waited_ms(self.now).items())]
        return self.event(event.split())

    def event(self, words: list[str]) -> list[str]:
        if words[0].startswith("at="):
            self.now_ms = int(words.pop(0)[3:])
        match words:
            case ["want", *names, "may-search=no"]:
                self.may_search = False
                return self.event(["want", *names])
            case ["want", "shared"]:
                self.lookup = ResponseLookup(WANT, self._may_search, self.now)
                effects = self.lookup.read_shared()
            case ["want", *names]:
                self.lookup = ResponseLookup(WANT, self._may_search, self.now)
                effects = self.lookup.ask_peers(candidates(names), self.now)
            case ["shared", "hit"]:
                effects = self.lookup.on_shared_hit()
            case ["miss", *names]:
                effects = self.lookup.ask_peers(candidates(names), self.now)
            case ["tick"]:
                effects = self.lookup.on_tick(self.now)
            case ["hit", name]:
                effects = self.lookup.on_fetched(ResponseFetched(1, PeerId(name), 1, 1, 1))
            case ["refused", name, reason]:
                effects = self.lookup.on_refused(ResponseRefused(1, PeerId(name), Reason(reason)), self.now)
            case ["found", *names]:
                effects = self.lookup.on_providers(candidates(names), self.now)
            case _:
                raise ValueError(words)
        return [self.told(effect) for effect in effects]

    def told(self, effect: NetworkEffect) -> str:
        match effect:
            case HintResponse(_, hinted):
                return "hinted" if hinted else "unhinted"
            case ReadShared(_, request_hash, timeout_ms) if request_hash == WANTED:
                return f"read shared for {timeout_ms}"
            case FetchResponse(_, peer, _, request_hash, timeout_ms) if request_hash == WANTED:
                return f"fetch {peer} for {timeout_ms}"
            case SearchDht(_, request_hash, timeout_ms) if request_hash == WANTED:
                return f"search for {timeout_ms}"
            case AnswerResponse(_, peer, source, reason):
                return f"answer {peer} {source} {reason}"
            case _:
                raise ValueError(effect)

    def _may_search(self, request_hash: bytes, now: Now) -> bool:
        assert request_hash == WANTED
        self.searches += 1
        return self.may_search
