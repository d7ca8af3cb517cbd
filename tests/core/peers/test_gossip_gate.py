"""Which gossip a node takes and passes on, and whom what it doesn't take is held against."""

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.peers.gossip_gate import BURST_S, GossipGate, Verdict, message_cost
from hyperspace_vllm.core.records.announcement import (
    PREFIX_TOPIC,
    RESPONSE_TOPIC,
    Announcement,
    ResponseEntry,
    encode_announcement,
)
from hyperspace_vllm.core.records.ids import PeerId, network_id, peer_id
from hyperspace_vllm.core.records.limits import (
    CLOCK_SKEW_MS,
    GOSSIP_INVALID_BURST,
    GOSSIP_OF_ALL_PER_S,
    GOSSIP_OF_AUTHOR_PER_S,
    GOSSIP_OF_SOURCE_PER_S,
    RESPONSE_TTL_MS,
)
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from tests.support.moments import dated
from tests.support.network_world import NETWORK, NOW_MS, Identity

ACCEPT, IGNORE, REJECT, MUTE = Verdict.ACCEPT, Verdict.IGNORE, Verdict.REJECT, Verdict.MUTE
LINK = PeerId("the neighbour that it came by")
MET = Rank.MET


def batch(author: Identity, sequence: int = 1, sent_at_ms: int = NOW_MS, key: SigningKey | None = None) -> bytes:
    entry = ResponseEntry(bytes(32), NOW_MS + RESPONSE_TTL_MS)
    unsigned = Announcement(NETWORK, author.public_key, sequence, sent_at_ms, (entry,))
    return encode_announcement(unsigned, key or author.key)


class Gate:
    """A gate that knows some authors; all of them are met, each at a host of its own, unless told otherwise."""

    def __init__(self, *known: int, rank: Rank = MET, source: str = "") -> None:
        self.gate = GossipGate(NETWORK, dated(NOW_MS))
        self.gate.authors = {
            Identity(number).peer: Acquaintance(rank, source or Identity(number).host) for number in known
        }

    def judge(
        self,
        author: int = 1,
        payload: bytes | None = None,
        topic: str = RESPONSE_TOPIC,
        signed: bool = True,
        link: PeerId = LINK,
        now_ms: int = NOW_MS,
        mono_ms: int | None = None,
    ) -> Verdict:
        now = dated(now_ms) if mono_ms is None else Now(mono_ms, now_ms)
        who = Identity(author)
        said = batch(who, sent_at_ms=now_ms) if payload is None else payload
        return self.gate.judge(link, topic, who.peer, said, lambda: signed, now)

    def accepted(self, author: int, count: int = 100_000, now_ms: int = NOW_MS) -> int:
        """How many messages of an author pass before the first that doesn't."""
        payload = batch(Identity(author), sent_at_ms=now_ms)
        return next((n for n in range(count) if self.judge(author, payload, now_ms=now_ms) is not ACCEPT), count)


ME, OTHER = Identity(1), Identity(2)
GOOD = batch(ME)
UNKNOWN_KIND = GOOD[:80] + b"\x63" + GOOD[81:]
NETWORK_2 = encode_announcement(
    Announcement(network_id("other"), ME.public_key, 1, NOW_MS, (ResponseEntry(bytes(32), NOW_MS + 1),)), ME.key
)


@pytest.mark.parametrize(
    ("payload", "topic", "signed", "verdict"),
    [
        (GOOD, RESPONSE_TOPIC, True, ACCEPT),
        (b"", RESPONSE_TOPIC, True, REJECT),
        (b"rubbish" * 20, RESPONSE_TOPIC, True, REJECT),
        (GOOD[:-1], RESPONSE_TOPIC, True, REJECT),
        (GOOD, PREFIX_TOPIC, True, REJECT),
        (GOOD, RESPONSE_TOPIC, False, REJECT),
        (NETWORK_2, RESPONSE_TOPIC, True, REJECT),
        (batch(OTHER), RESPONSE_TOPIC, True, REJECT),  # another's words
        (batch(ME, key=OTHER.key), RESPONSE_TOPIC, True, REJECT),
        (UNKNOWN_KIND, RESPONSE_TOPIC, True, IGNORE),  # of a later version
        (batch(ME, sent_at_ms=NOW_MS - CLOCK_SKEW_MS - 1), RESPONSE_TOPIC, True, IGNORE),
        (batch(ME, sent_at_ms=NOW_MS + CLOCK_SKEW_MS + 1), RESPONSE_TOPIC, True, IGNORE),
    ],
)
def test_what_no_honest_node_passes_on_is_rejected(payload: bytes, topic: str, signed: bool, verdict: Verdict) -> None:
    assert Gate(1, 2).judge(1, payload, topic, signed) is verdict


def test_an_author_that_is_not_known_is_ignored_and_held_against_nobody() -> None:
    gate = Gate(1)
    assert {gate.judge(2) for _ in range(10 * GOSSIP_INVALID_BURST)} == {IGNORE}
    assert gate.judge(1) is ACCEPT


def test_a_link_that_goes_on_with_rubbish_is_not_listened_to_and_others_are() -> None:
    gate = Gate(1)
    verdicts = [gate.judge(1, b"rubbish") for _ in range(GOSSIP_INVALID_BURST)]
    assert verdicts == [REJECT] * (GOSSIP_INVALID_BURST - 1) + [MUTE]
    assert gate.judge(1) is IGNORE
    assert gate.judge(1, link=PeerId("another")) is ACCEPT
    gate.gate.forget(LINK)
    assert gate.judge(1) is ACCEPT


def test_forgeries_in_an_authors_name_spend_none_of_its_allowance() -> None:
    gate, honest = Gate(1), Gate(1)
    for number in range(10 * GOSSIP_OF_AUTHOR_PER_S * BURST_S // GOSSIP_INVALID_BURST):
        for _ in range(GOSSIP_INVALID_BURST):
            gate.judge(1, signed=False, link=PeerId(str(number)))
    assert gate.accepted(1) == honest.accepted(1) > 0


def test_an_author_has_an_allowance_whichever_way_its_words_come() -> None:
    gate = Gate(1, 2)
    cost = message_cost(len(GOOD))
    assert gate.accepted(1) == int(GOSSIP_OF_AUTHOR_PER_S * BURST_S / cost)
    assert gate.judge(1, link=PeerId("another")) is IGNORE
    assert gate.judge(2) is ACCEPT
    assert gate.accepted(1, now_ms=NOW_MS + 1_000) == int(GOSSIP_OF_AUTHOR_PER_S / cost)


def test_one_host_has_an_allowance_under_however_many_names() -> None:
    crowd = range(10, 40)
    gate = Gate(*crowd, source="192.0.2.1")
    gate.gate.authors = {**gate.gate.authors, OTHER.peer: Acquaintance(MET, "192.0.2.2")}
    passed = sum(gate.accepted(number) for number in crowd)
    assert passed <= GOSSIP_OF_SOURCE_PER_S * BURST_S < len(crowd) * GOSSIP_OF_AUTHOR_PER_S * BURST_S
    assert gate.judge(2) is ACCEPT


def test_authors_that_were_only_told_of_leave_half_to_those_that_were_met_and_the_listed() -> None:
    crowd = range(100, 100 + GOSSIP_OF_ALL_PER_S // GOSSIP_OF_AUTHOR_PER_S * 3)
    gate = Gate(*crowd, rank=Rank.TOLD)
    met, listed = Identity(1), Identity(2)
    gate.gate.authors = {
        **gate.gate.authors,
        met.peer: Acquaintance(MET, met.host),
        listed.peer: Acquaintance(Rank.LISTED, met.host),
    }
    assert sum(gate.accepted(number) for number in crowd) <= GOSSIP_OF_ALL_PER_S * BURST_S / 2
    full = int(GOSSIP_OF_AUTHOR_PER_S * BURST_S / message_cost(len(GOOD)))
    assert gate.accepted(1) == gate.accepted(2) == full


def test_what_is_kept_of_authors_ends_with_their_being_known() -> None:
    gate = Gate(*range(1, 50))
    for number in range(1, 50):
        gate.judge(number)
    gate.gate.authors = {ME.peer: Acquaintance(MET, ME.host)}
    gate.judge(1)
    assert len(gate.gate._of_author) == len(gate.gate._of_source) == 1


def test_a_clock_that_is_set_back_stops_nobody() -> None:
    gate = Gate(1)
    gate.judge(1, b"rubbish")
    assert gate.judge(1, now_ms=NOW_MS - 3_600_000, mono_ms=dated(NOW_MS).mono_ms) is ACCEPT
    assert peer_id(ME.public_key) in gate.gate._of_author
