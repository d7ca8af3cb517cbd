"""Membership's connections: heartbeats, dials, and which addresses are dialled."""

import pytest

from hyperspace_vllm.core.events.connections import Connect, Disconnect
from hyperspace_vllm.core.events.vocabulary import NetworkEffect
from hyperspace_vllm.core.peers.address import may_dial
from hyperspace_vllm.core.peers.membership import EXPLORE_MS, HEARTBEAT_MS, PING_MS, SILENT_DISCONNECT_MS
from hyperspace_vllm.core.peers.neighbours import (
    CONNECT_MS,
    DIAL_AGAIN_MS,
    DIAL_AGAIN_MS_MAX,
    TARGET_NEIGHBOURS,
    dial_delay_ms,
)
from hyperspace_vllm.core.records.peer_wire import Ping
from tests.support.machines.member_node import Node, peers
from tests.support.moments import dated
from tests.support.network_world import NOW_MS, SECOND_MS, Identity, only

# --- heartbeats ---------------------------------------------------------------------------------


def test_a_frozen_neighbour_is_noticed_within_five_seconds_and_used_again_once_heard() -> None:
    node = Node()
    node.connect(1)
    began_ms = node.now_ms
    while node.usable():
        node.run(100, answer=False)
    assert HEARTBEAT_MS < node.now_ms - began_ms < 5_000
    assert node.neighbours() == set()
    assert node.members.changed
    node.members.heard(Identity(1).peer, node.now)
    assert node.neighbours() == node.usable() == peers(1)


def test_a_failed_ping_tells_earlier_than_the_beat() -> None:
    node = Node()
    node.connect(1)
    node.run(HEARTBEAT_MS, answer=False)
    assert any(isinstance(send.message, Ping) for send in node.sent)
    node.members.unanswered(Identity(1).peer, Ping(), dated(node.now_ms + PING_MS))
    assert node.usable() == set()


def test_whoever_was_just_heard_is_not_pinged() -> None:
    node = Node()
    node.connect(1)
    for _ in range(10):
        node.members.heard(Identity(1).peer, node.now)
        node.run(900)
    assert not [send for send in node.sent if isinstance(send.message, Ping)]


def test_a_silent_neighbour_is_replaced_pinged_on_and_at_last_disconnected() -> None:
    node = Node()
    for number in range(1, 20):
        node.learn(number, address=f"203.0.113.{number}:1")
    node.connect(*range(1, TARGET_NEIGHBOURS + 1), chosen=True)
    known = node.members.get(Identity(1).peer)
    assert known is not None
    effects: list[NetworkEffect] = []
    for _ in range(SILENT_DISCONNECT_MS // SECOND_MS + 6):
        for number in range(2, TARGET_NEIGHBOURS + 1):
            node.members.heard(Identity(number).peer, node.now)
        effects += node.run(SECOND_MS, answer=False)
    assert len([send for send in node.sent if send.peer == Identity(1).peer and isinstance(send.message, Ping)]) > 5
    assert Disconnect(Identity(1).peer) in effects
    assert only(effects, Connect)


def test_a_process_that_was_stopped_for_a_minute_disconnects_nobody() -> None:
    node = Node()
    node.connect(1, 2)
    node.run(HEARTBEAT_MS, answer=False)  # pings are on their way
    node.now_ms += 60 * SECOND_MS
    assert not only(node.run(HEARTBEAT_MS), Disconnect)
    node.run(2 * HEARTBEAT_MS)
    assert node.neighbours() == peers(1, 2)


# --- dialling -----------------------------------------------------------------------------------


def test_the_bootstrap_list_is_dialled_first_and_again_for_ever() -> None:
    node = Node(bootstrap=(1,))
    assert node.members.start(dated(NOW_MS)) == [Connect(Identity(1).peer, Identity(1).address, CONNECT_MS)]
    node.members.on_connect_failed(Identity(1).peer, dated(NOW_MS))
    dials = only(node.run(10 * 60 * SECOND_MS), Connect)
    assert len(dials) >= 10 * 60 * SECOND_MS / (DIAL_AGAIN_MS_MAX + HEARTBEAT_MS)
    assert len(dials) <= 10 * 60 * SECOND_MS / (DIAL_AGAIN_MS_MAX / 2) + 5


@pytest.mark.parametrize(("failures", "delay_ms"), [(0, DIAL_AGAIN_MS), (1, 4_000), (2, 8_000), (3, DIAL_AGAIN_MS_MAX)])
def test_dials_are_repeated_later_and_later_up_to_a_bound(failures: int, delay_ms: int) -> None:
    assert dial_delay_ms(failures) == delay_ms
    assert dial_delay_ms(1_000) == DIAL_AGAIN_MS_MAX


def test_a_dial_that_nobody_answers_for_is_given_up() -> None:
    node = Node(bootstrap=(1,))
    node.members.start(dated(NOW_MS))
    dials = only(node.run(4 * CONNECT_MS, answer=False), Connect)
    assert dials  # the first was never answered


def test_a_restarted_peer_is_dialled_at_its_new_address_at_once() -> None:
    node = Node()
    node.learn(1, address="203.0.113.1:9")
    (dial,) = only(node.run(HEARTBEAT_MS, answer=False), Connect)
    node.members.on_connect_failed(dial.peer, node.now)
    assert node.usable() == set()
    node.learn(1, sequence=2, address="203.0.113.2:9")
    assert node.usable() == peers(1)
    (dial,) = only(node.run(HEARTBEAT_MS, answer=False), Connect)
    assert dial.address == "203.0.113.2:9"


def test_a_bootstrap_node_is_dialled_where_it_says_and_where_it_was_configured() -> None:
    node = Node(bootstrap=(1,))
    node.learn(1, address="203.0.113.1:9")
    addresses = {effect.address for effect in only(node.run(60 * SECOND_MS), Connect)}
    assert addresses == {"203.0.113.1:9", Identity(1).address}


def test_who_takes_connections_only_to_close_them_is_left_alone() -> None:
    node = Node()
    node.learn(1)
    dials = 0
    for _ in range(60):
        for effect in only(node.run(SECOND_MS, answer=False), Connect):
            dials += 1
            node.members.on_connected(effect.peer, Identity(1).host, node.now)
            node.members.on_disconnected(effect.peer, node.now)
    assert dials <= 60 * SECOND_MS / (DIAL_AGAIN_MS_MAX / 2) + 3


def test_a_node_with_neighbours_enough_still_looks_around() -> None:
    node = Node()
    for number in range(1, 20):
        node.learn(number, address=f"203.0.113.{number}:1")
    node.connect(*range(1, TARGET_NEIGHBOURS + 1), chosen=True)
    dials = only(node.run(3 * EXPLORE_MS), Connect)
    assert len(dials) == 3
    assert {dial.peer for dial in dials} <= peers(*range(TARGET_NEIGHBOURS + 1, 20))


def test_a_sign_of_life_makes_a_peer_usable_that_could_not_be_dialled() -> None:
    node = Node()
    node.learn(1)
    node.members.on_connect_failed(Identity(1).peer, node.now)
    assert node.usable() == set()
    node.members.is_alive(Identity(1).peer, node.now)
    assert node.usable() == peers(1)


@pytest.mark.parametrize(
    ("address", "own", "dialled"),
    [
        ("10.0.0.1:4001", "10.0.0.2:4001", True),
        ("203.0.113.9:65535", "10.0.0.2:4001", True),
        ("[2a00::1]:4001", "10.0.0.2:4001", True),
        ("127.0.0.1:22", "10.0.0.2:4001", False),
        ("[::1]:22", "10.0.0.2:4001", False),
        ("[::ffff:127.0.0.1]:22", "10.0.0.2:4001", False),
        ("127.0.0.1:4001", "127.0.0.1:4002", True),
        ("10.0.0.1:4001", "127.0.0.1:4002", True),
        ("169.254.169.254:80", "10.0.0.2:4001", False),
        ("0.0.0.0:4001", "10.0.0.2:4001", False),
        ("[::]:4001", "10.0.0.2:4001", False),
        ("224.0.0.1:4001", "10.0.0.2:4001", False),
        ("255.255.255.255:4001", "10.0.0.2:4001", False),
        ("localhost:22", "10.0.0.2:4001", False),
        ("metadata.internal:80", "10.0.0.2:4001", False),
        ("10.0.0.1:0", "10.0.0.2:4001", False),
        ("10.0.0.1:65536", "10.0.0.2:4001", False),
        ("10.0.0.1:-1", "10.0.0.2:4001", False),
        ("10.0.0.1", "10.0.0.2:4001", False),
        ("", "10.0.0.2:4001", False),
        (":4001", "10.0.0.2:4001", False),
    ],
)
def test_only_addresses_that_can_be_another_machine_are_dialled(address: str, own: str, dialled: bool) -> None:
    assert may_dial(address, own, None) is dialled
    node = Node(address=own)
    node.members.on_connected(Identity(2).peer, own.partition(":")[0], node.now)
    node.learn(2, own_word=True)
    node.learn(1, told_by=2, address=address)
    assert bool(only(node.run(HEARTBEAT_MS), Connect)) is dialled
