"""Responses that are looked for at other nodes: which peers are asked, and for which a request waits."""

from hyperspace_vllm.core.events.connections import PeerConnected
from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ResponseWanted,
)
from hyperspace_vllm.core.node.own_requests import REQUESTS_MAX
from hyperspace_vllm.core.peers.avoidance import LIAR_MS
from hyperspace_vllm.core.peers.patience import LENT_MAX_MS, LENT_SHARE
from hyperspace_vllm.core.peers.standing import Delivered
from hyperspace_vllm.core.response.lookup import RACE_MS
from hyperspace_vllm.core.response.open_lookups import LOOKUPS_MAX
from tests.support.moments import dated
from tests.support.network_script import Script, response
from tests.support.network_world import (
    NOW_MS,
    Identity,
    make_node,
    only,
)


def test_what_gossip_announced_is_fetched_from_who_announced_it() -> None:
    Script().run(
        """
        > meet 1 2
        > gossip 1 ab
        > want a
        hint yes
        fetch a from 1 for 300
        > at=10 got a 1
        answer a 1 hint hit
        > want c                    # nobody announced it: the engine begins while the DHT is asked
        hint no
        search c
        > at=60 found c
        answer c none none not_found
        > at=100 want c             # not again at once
        hint no
        answer c none none not_found
        > at=5000 want c            # and asking in vain doesn't put off the next search
        hint no
        answer c none none not_found
        > at=10100 want c
        hint no
        search c
        """
    )


def test_without_peers_no_lookup_begins() -> None:
    Script().run(
        """
        > want a
        hint no
        answer a none none no_peers
        """
    )


def test_a_liar_is_charged_and_not_asked_again_for_a_while() -> None:
    script = Script()
    script.run(
        """
        > meet 1 2
        > gossip 1 ab
        > want a
        hint yes
        fetch a from 1 for 300
        > refused a 1 bad_signature
        charge 1 bad_signature
        hint no
        search a
        > found a 1                 # the DHT knows nobody else
        answer a none none bad_signature
        > want b
        hint no
        search b
        > found b
        answer b none none not_found
        """
    )
    script.now_ms += LIAR_MS
    script.run(f"> meet 2\n> at={LIAR_MS} gossip 1 b\n> want b\nhint yes\nfetch b from 1 for 300")


def test_a_miss_takes_back_the_hint() -> None:
    Script().run(
        """
        > meet 1 2
        > gossip 1 a
        > want a
        hint yes
        fetch a from 1 for 300
        > refused a 1 miss
        hint no
        search a
        > found a
        answer a none none not_found
        > want a
        hint no
        answer a none none not_found
        """
    )


def test_whoever_said_so_first_is_asked_second_if_it_is_not_the_best() -> None:
    script = Script()
    script.run("> meet 1 2 3")
    script.node.members.on_record(Identity(4).record(), Identity(1).peer, dated(NOW_MS), own_word=False)
    script.run(
        """
        > gossip 4 a                # not connected, but heard before those who may merely repeat it
        > want a 4 1 2 3
        hint yes
        fetch a from 3 for 300
        > refused a 3 miss
        fetch a from 4 for 300
        """
    )


def test_a_connection_that_opened_just_before_the_deadline_costs_a_peer_nothing() -> None:
    script = Script()
    script.run("> meet 2")
    script.node.members.on_record(Identity(1).record(), Identity(2).peer, dated(NOW_MS), own_word=False)
    script.run(
        """
        > gossip 1 ab
        > want a
        hint yes
        fetch a from 1 for 300
        > at=290 meet 1
        > at=299 refused a 1 timeout
        hint no
        search a
        > at=299 want b
        hint yes
        fetch b from 1 for 300
        """
    )


def test_who_could_not_be_reached_in_time_is_not_asked_for_seconds() -> None:
    script = Script()
    script.node.handle(PeerConnected(Identity(2).peer, Identity(2).host), dated(NOW_MS))
    script.run("> meet 2")
    record = Identity(1).record()
    want = next(s for s in script.sends.values()) if script.sends else None
    assert want is None or want.peer == Identity(2).peer
    script.node.members.on_record(record, Identity(2).peer, dated(NOW_MS), own_word=False)
    script.run(
        """
        > gossip 1 ab
        > want a
        hint yes
        fetch a from 1 for 300      # not connected: nobody sends it heartbeats
        > at=300 tick
        answer a none none deadline
        > at=301 want b
        hint no
        search b
        """
    )


def test_a_released_lookup_that_was_hinted_is_over_and_a_race_goes_on() -> None:
    Script().run(
        """
        > meet 1
        > gossip 1 a
        > want a
        hint yes
        fetch a from 1 for 300
        > release a
        answer a none none released
        > got a 1                   # too late
        > want b
        hint no
        search b
        > release b                 # the engine won; what is found still serves the next request
        > at=50 found b 1
        fetch b from 1 for 2950
        > at=60 got b 1
        answer b 1 dht hit
        """
    )


def test_providers_that_the_shell_knows_of_are_hints_too() -> None:
    Script().run(
        """
        > meet 1
        > want a 1
        hint yes
        fetch a from 1 for 300
        """
    )


def test_a_hint_at_somebody_unknown_is_none() -> None:
    Script().run(
        """
        > meet 1
        > gossip 7 a                # a member, but nobody has shown its record
        > want a
        hint no
        search a
        """
    )


def test_a_stranger_makes_no_request_wait_until_it_has_delivered_nor_for_longer_than_that_earned_it() -> None:
    script = Script(make_node(network_key=None))
    script.run(
        f"""
        > meet 1
        > gossip 1 abcd
        > want a
        hint no
        fetch a from 1 for {RACE_MS}
        > at=40 got a 1
        answer a 1 hint hit
        > want b
        hint yes
        fetch b from 1 for 300
        > at=330 refused b 1 miss       # 290 of the 300 ms that its delivery earned it
        hint no
        search b
        > found b
        answer b none none not_found
        > want c
        hint yes
        fetch c from 1 for 300
        > at=340 refused c 1 miss
        hint no
        search c
        > found c
        answer c none none not_found
        > want d
        hint no
        fetch d from 1 for {RACE_MS}
        """
    )


def test_strangers_are_asked_after_those_a_request_waits_for() -> None:
    script = Script(make_node(network_key=None, listed=(2,)))
    script.run("> meet 1 2 3\n> want a 1 3 2\nhint yes\nfetch a from 2 for 300")


def test_members_that_never_delivered_waste_no_more_than_all_of_them_are_lent() -> None:
    """A holder of the network key can be as many members as it likes."""
    script = Script()
    waits = 0
    for number in range(1, 40):
        script.run(f"> meet {number}\n> gossip {number} a")
        hint, *_ = script.act(f"want a {number}")
        waits += hint == "hint yes"
        script.now_ms += 300
        script.act("tick")
        script.act("release a")
        script.act(f"refused a {number} timeout")
        script.act("found a")
        script.act(f"at={script.now_ms - NOW_MS + RACE_MS} tick")
    passed_ms = script.now_ms - NOW_MS
    assert LENT_MAX_MS // 300 <= waits <= (LENT_MAX_MS + LENT_SHARE * passed_ms) / 300 + 1


def test_what_a_convicted_peer_says_it_has_is_not_waited_for() -> None:
    script = Script()
    script.run("> meet 1")
    script.node._trust.standings.note(Delivered(Identity(1).peer, 1, 1), dated(NOW_MS))
    script.node._trust.standings.convict(Identity(1).public_key, dated(NOW_MS))
    script.run(f"> want a 1\nhint no\nfetch a from 1 for {RACE_MS}")


def test_hinted_lookups_leave_the_search_budget_alone() -> None:
    script = Script()
    script.run("> meet 1 2")
    for _ in range(100):
        script.run("> want a 1\nhint yes\nfetch a from 1 for 300\n> got a 1\nanswer a 1 hint hit")
    script.run("> want b\nhint no\nsearch b")


def test_lookups_and_requests_are_bounded() -> None:
    script = Script()
    script.run("> meet 1 2")
    peer = Identity(1).peer
    for lookup in range(LOOKUPS_MAX):
        effects = script.node.handle(ResponseWanted(lookup, response("a"), 300, (peer,)), dated(NOW_MS))
        assert isinstance(effects[1], FetchResponse)
    busy = script.node.handle(ResponseWanted(LOOKUPS_MAX, response("a"), 300, (peer,)), dated(NOW_MS))
    assert busy == [HintResponse(LOOKUPS_MAX, False), AnswerResponse(LOOKUPS_MAX, None, "none", "busy")]
    answers = only(script.node.handle(Tick(), dated(NOW_MS + 300)), AnswerResponse)
    assert [answer.reason for answer in answers] == ["deadline"] * LOOKUPS_MAX
    for number in range(REQUESTS_MAX + 10):
        script.node.handle(PeerConnected(peer), dated(NOW_MS + number))
    assert len(script.node._requests._open) == REQUESTS_MAX
