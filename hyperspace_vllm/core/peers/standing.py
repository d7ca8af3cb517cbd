"""The standing of each peer: how much it is trusted, and how long it is not asked. No other module judges peers.

Input: what a peer delivered, how it failed (records/reason.py says how serious that is), what this node's audits found,
and accusations by other nodes. Output, one object for each peer:

    service    what it delivered, signed by any peer, against its failures and lies: the order in which peers are asked
    word       what audits passed of what it signed, against its lies: whether its signatures are trusted
    avoidance  until when it is asked for nothing, or for no KV; whether its connections are refused
    earned     for how long requests may wait for it
    findings   what audits found of what it signed; since when it is convicted

A lie counts in every layer: a peer that alters data may also sign false data. Being slow counts only in the layer where
the peer was slow. An object is forgotten when PEERS_KNOWN_MAX others hold more, and when the node ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import assert_never

from ..records.ids import PeerId, peer_id
from ..records.limits import PEERS_KNOWN_MAX
from ..records.now import Now
from ..records.reason import Reason, Severity
from .avoidance import LIAR_MS, Avoidance
from .findings import Findings, doubts
from .patience import Loan, earned_more
from .reputation import Reputation
from .suspicion import Accusations

STALLED_MS = 5_000  # a stall is not a lie, but it costs a request its budget; doubled every time in a row
_SLOW = (Reason.STALLED, Reason.TOO_SLOW)
CONVICTED_MS = 24 * 3_600_000  # the life of a response: what it signed before has expired by then


@dataclass(frozen=True, slots=True)
class Delivered:
    """The peer sent verified bytes within this time."""

    peer: PeerId
    bytes: int
    ms: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The peer did not deliver, or broke a rule; the reason says which."""

    peer: PeerId
    reason: Reason


@dataclass(slots=True)
class Standing:
    """What is known of one peer's conduct."""

    service: Reputation = field(default_factory=Reputation)
    word: Reputation = field(default_factory=Reputation)
    avoidance: Avoidance = field(default_factory=Avoidance)
    no_kv_until_ms: int = 0
    stalls: int = 0  # in a row
    earned_ms: float = 0.0
    findings: Findings = field(default_factory=Findings)
    convicted_at_ms: int | None = None
    last_ms: int = 0  # when something was last noted

    @property
    def weight(self) -> tuple[bool, bool, float, int]:
        """Objects with the least weight are forgotten first; new identities, which cost nothing, replace each other."""
        is_convicted, is_found = self.convicted_at_ms is not None, bool(self.findings.found_ms)
        return is_convicted, is_found, self.service.successes + self.word.successes, self.last_ms


_UNKNOWN = Standing()  # never changed


class Standings:
    """The standings of all peers, by this node's own experience. `own_key` is never suspected."""

    def __init__(self, own_key: bytes) -> None:
        self._own_key = own_key
        self._peers: dict[PeerId, Standing] = {}
        self._accusations = Accusations(own_key)
        self._loan = Loan()

    # --- facts ----------------------------------------------------------------------------------

    def note(self, fact: Delivered | Failed, now: Now) -> None:
        """Something happened with a peer."""
        match fact:
            case Delivered(peer):
                standing = self._of(peer, now)
                standing.service.served(now)
                standing.avoidance.served()
                standing.stalls = 0
                standing.earned_ms = earned_more(standing.earned_ms)
            case Failed(peer, reason):
                if reason.severity is not Severity.NONE or reason is Reason.MISS:
                    self._failed(self._of(peer, now), reason, now)
            case _:
                assert_never(fact)

    def spoke(self, peer: PeerId) -> None:
        """The peer was silent and answers again. Its lies still count."""
        if (standing := self._peers.get(peer)) is not None:
            standing.avoidance.back()

    def goes_on(self, peer: PeerId, now: Now) -> None:
        """The peer breaks rules again while it is avoided: its connections are refused for a while."""
        self._of(peer, now).avoidance.cut_off(now)

    def wasted(self, waited_ms: Mapping[PeerId, int], now: Now) -> None:
        """A request waited for each of these peers at once, for this time, and they delivered nothing."""
        lent_ms = 0
        for peer, for_ms in waited_ms.items():
            if self.has_earned(peer):
                standing = self._peers[peer]
                standing.earned_ms = max(standing.earned_ms - for_ms, 0.0)
            else:
                lent_ms = max(lent_ms, for_ms)
        self._loan.spend(lent_ms, now)

    def passed(self, signer: bytes, source: bytes, now: Now) -> None:
        """A response that the peer signed has passed an audit."""
        standing = self._of(peer_id(signer), now)
        if standing.findings.passed(source, now):
            standing.word.served(now)

    def found_false(self, signer: bytes, source: bytes, now: Now) -> bool:
        """An audit found a response that the peer signed false; whether that convicts it, which counts as a lie."""
        standing = self._of(peer_id(signer), now)
        if not standing.findings.found(source, now) or self.doubts_itself(now):
            return False
        self.convict(signer, now)
        self._failed(standing, Reason.FALSE_RESPONSE, now)
        return True

    def convict(self, signer: bytes, now: Now) -> None:
        """Nothing that the peer signed counts for CONVICTED_MS."""
        if signer != self._own_key:
            self._of(peer_id(signer), now).convicted_at_ms = now.mono_ms

    def accuse(self, accuser: bytes, accused: bytes, now: Now) -> None:
        """`accuser`, which may be this node, says that `accused` signed a false answer."""
        self._accusations.accuse(accuser, accused, now)

    # --- questions ------------------------------------------------------------------------------

    def service(self, peer: PeerId, now: Now) -> float:
        """How well it serves, in [0, 1]."""
        return self._peers.get(peer, _UNKNOWN).service.score(now)

    def word(self, peer: PeerId, now: Now) -> float:
        """How far its signatures are trusted, in [0, 1]."""
        return self._peers.get(peer, _UNKNOWN).word.score(now)

    def avoids(self, peer: PeerId, now: Now) -> bool:
        """Whether to ask it for nothing now."""
        return self._peers.get(peer, _UNKNOWN).avoidance.avoids(now)

    def avoids_for_kv(self, peer: PeerId, now: Now) -> bool:
        """Whether to ask it for no KV now."""
        return now.mono_ms < self._peers.get(peer, _UNKNOWN).no_kv_until_ms

    def is_cut_off(self, peer: PeerId, now: Now) -> bool:
        """Whether to refuse its connections."""
        return self._peers.get(peer, _UNKNOWN).avoidance.is_cut_off(now)

    def has_earned(self, peer: PeerId) -> bool:
        """Whether the peer has delivered more than it has wasted; from any thread."""
        return self._peers.get(peer, _UNKNOWN).earned_ms > 0

    def lends(self, now: Now) -> bool:
        """Whether a request may wait for members that have earned nothing."""
        return self._loan.left_ms(now) > 0

    def is_convicted(self, signer: bytes, now: Now) -> bool:
        """Whether this node's own audits convict it."""
        since_ms = self._peers.get(peer_id(signer), _UNKNOWN).convicted_at_ms
        return since_ms is not None and now.mono_ms - since_ms < CONVICTED_MS

    def suspects(self, signer: bytes, now: Now) -> bool:
        """Whether all of its answers are to be audited."""
        return self.is_convicted(signer, now) or self._accusations.stand_against(signer, now)

    def suspected(self, now: Now) -> int:
        """The number of suspected or convicted peers, for status."""
        accused = {peer_id(key) for key in self._accusations.accused(now)}
        convicted = {
            peer
            for peer, standing in self._peers.items()
            if standing.convicted_at_ms is not None and now.mono_ms - standing.convicted_at_ms < CONVICTED_MS
        }
        return len(accused | convicted)

    def doubts_itself(self, now: Now) -> bool:
        """Whether this node's engine disagrees with so many signers that it is more likely wrong than they are."""
        return doubts((standing.findings for standing in self._peers.values()), now)

    # --- leaves ---------------------------------------------------------------------------------

    def _failed(self, standing: Standing, reason: Reason, now: Now) -> None:
        if reason is Reason.MISS:
            standing.avoidance.missed(now)
            return
        standing.service.failed(reason, now)
        if reason.is_lie:
            standing.word.failed(reason, now)
            standing.avoidance.lied(now)
        elif reason.severity is not Severity.BUSY and reason not in _SLOW:
            standing.avoidance.failed(now)
        no_kv_ms = LIAR_MS if reason.is_guilty else 0
        if reason in _SLOW:
            no_kv_ms = min(STALLED_MS << min(standing.stalls, 10), LIAR_MS)
            standing.stalls += 1
        standing.no_kv_until_ms = max(standing.no_kv_until_ms, now.mono_ms + no_kv_ms)

    def _of(self, peer: PeerId, now: Now) -> Standing:
        standing = self._peers.get(peer)
        if standing is None:
            if len(self._peers) >= PEERS_KNOWN_MAX:
                del self._peers[min(self._peers, key=lambda each: self._peers[each].weight)]
            standing = self._peers[peer] = Standing()
        standing.last_ms = now.mono_ms
        return standing
