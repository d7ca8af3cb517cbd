"""Which addresses are dialled, and how often."""

import pytest

from hyperspace_vllm.core.peers.address import Scope, host_of, may_dial, scope_of
from hyperspace_vllm.core.peers.dials import Dials
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.limits import (
    DIALS_BURST_S,
    DIALS_COUNTED_MAX,
    DIALS_OF_PEER_PER_S,
    DIALS_OWN_PER_S,
    DIALS_OWN_TO_HOST_PER_S,
    DIALS_PER_S,
    DIALS_TO_HOST_PER_S,
)
from tests.support.moments import dated
from tests.support.network_world import NOW_MS

MACHINE, LINK, PRIVATE, GLOBAL = Scope


@pytest.mark.parametrize(
    ("host", "scope"),
    [
        ("127.0.0.1", MACHINE),
        ("127.9.9.9", MACHINE),
        ("[::1]", MACHINE),
        ("[::ffff:127.0.0.1]", MACHINE),
        ("[64:ff9b::7f00:1]", MACHINE),
        ("[2002:7f00:1::]", MACHINE),
        ("[::127.0.0.1]", MACHINE),
        ("169.254.169.254", LINK),
        ("[::ffff:169.254.169.254]", LINK),
        ("[fe80::1]", LINK),
        ("[fe80::1%eth0]", LINK),
        ("10.0.0.1", PRIVATE),
        ("172.16.0.1", PRIVATE),
        ("172.32.0.1", GLOBAL),
        ("192.168.1.1", PRIVATE),
        ("100.64.0.1", PRIVATE),
        ("[fd00::1]", PRIVATE),
        ("[64:ff9b::a00:1]", PRIVATE),
        ("203.0.113.9", GLOBAL),
        ("[2a00::1]", GLOBAL),
        ("[2a00::1%lo]", None),
        ("[2001:500::1]", GLOBAL),
        ("[2002:808:808::]", GLOBAL),
        ("[2002:a00:1::]", PRIVATE),
        ("[64:ff9b::808:808]", GLOBAL),
        ("[::ffff:0:a00:1]", PRIVATE),  # SIIT
        ("[::ffff:0:7f00:1]", MACHINE),
        ("[::ffff:0:808:808]", GLOBAL),
        ("[64:ff9b:1::a00:1]", None),  # NAT64 for local use: where the IPv4 address stands, its network knows
        ("[64:ff9b:1:a00:0:100::]", None),
        ("[64:ff9b:2::1]", None),
        ("[2001::1]", None),  # Teredo
        ("[2001:db8::1]", None),
        ("[4000::1]", None),
        ("[100::1]", None),
        ("192.0.0.192", LINK),
        ("168.63.129.16", LINK),
        ("168.63.129.17", GLOBAL),
        ("198.18.0.1", PRIVATE),
        ("198.19.255.255", PRIVATE),
        ("198.20.0.1", GLOBAL),
        ("[64:ff9b::a83f:8110]", LINK),
        ("0.0.0.0", None),
        ("0.1.2.3", None),
        ("240.0.0.1", None),
        ("255.255.255.255", None),
        ("224.0.0.1", None),
        ("[ff02::1]", None),
        ("[::]", None),
        ("localhost", None),
        ("2130706433", None),
        ("127.1", None),
        ("", None),
    ],
)
def test_an_address_reaches_as_far_as_what_it_wraps(host: str, scope: Scope | None) -> None:
    assert scope_of(host) is scope


@pytest.mark.parametrize(
    ("address", "own", "told_from", "dialled"),
    [
        ("10.0.0.1:1", "10.0.0.2:1", "10.0.0.3", True),
        ("10.0.0.1:1", "10.0.0.2:1", "203.0.113.9", False),  # who comes from outside leads nobody inside
        ("10.0.0.1:1", "203.0.113.8:1", "10.0.0.3", False),
        ("203.0.113.9:1", "10.0.0.2:1", "10.0.0.3", True),
        ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1", True),
        ("127.0.0.1:1", "127.0.0.1:2", "10.0.0.3", False),  # a node that listens on loopback, in a fleet
        ("127.0.0.1:1", "10.0.0.2:1", "127.0.0.1", False),
        ("169.254.169.254:80", "169.254.1.1:1", "169.254.1.2", True),
        ("169.254.169.254:80", "10.0.0.2:1", None, False),
        ("127.0.0.1:1", "127.0.0.1:2", None, True),
        ("10.0.0.1:1", "10.0.0.2:1", "", False),  # who told it has gone
        ("203.0.113.9:1", "10.0.0.2:1", "", True),
        ("10.0.0.1:1", "", None, False),
    ],
)
def test_nothing_is_dialled_that_means_less_here_than_where_it_comes_from(
    address: str, own: str, told_from: str | None, dialled: bool
) -> None:
    assert may_dial(address, own, told_from) is dialled


@pytest.mark.parametrize(
    "address",
    ["", ":", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:x", "*:80", "example.org:80", "::1:80",
     "10.0.0.1:1;10.0.0.1:2", "eth0;10.0.0.1:2", "[10.0.0.1]:80", "10.0.0.1:٣", "/etc/x:1"],
)  # fmt: skip
def test_what_is_no_numeric_address_is_never_dialled(address: str) -> None:
    assert not may_dial(address, "127.0.0.1:1", None)


def test_one_host_has_one_spelling() -> None:
    assert {host_of(each) for each in ("[::ffff:10.0.0.1]:1", "10.0.0.1:2")} == {"10.0.0.1"}
    assert host_of("[2001:DB8:0::1]:1") == "2001:db8::1"


class Budget:
    """How many dials of a kind pass before the first that doesn't."""

    def __init__(self) -> None:
        self.dials = Dials(dated(NOW_MS))

    def passed(self, peers: int, hosts: int, own: bool, now_ms: int = NOW_MS) -> int:
        tried = 10_000
        now = dated(now_ms)
        return sum(
            self.dials.take(PeerId(f"p{n % peers}"), f"10.0.{n % hosts // 250}.{n % hosts % 250}:{n}", own, now)
            for n in range(tried)
        )


@pytest.mark.parametrize(
    ("peers", "hosts", "own", "per_s"),
    [
        (1, 1_000, False, DIALS_OF_PEER_PER_S),
        (1, 1_000, True, DIALS_OF_PEER_PER_S),
        (1_000, 1, False, DIALS_TO_HOST_PER_S),
        (1_000, 1, True, DIALS_OWN_TO_HOST_PER_S),
        (1_000, 1_000, False, DIALS_PER_S),
        (1_000, 1_000, True, DIALS_OWN_PER_S),
    ],
)
def test_dials_are_bounded_by_peer_by_host_and_in_all(peers: int, hosts: int, own: bool, per_s: float) -> None:
    budget = Budget()
    assert budget.passed(peers, hosts, own) == per_s * DIALS_BURST_S
    assert budget.passed(peers, hosts, own, NOW_MS + 1_000) == per_s


def test_claims_leave_peers_that_were_met_what_they_may() -> None:
    budget = Budget()
    budget.passed(1_000, 1_000, own=False)
    assert budget.dials.take(PeerId("met"), "10.9.9.9:1", True, dated(NOW_MS))
    assert not budget.dials.take(PeerId("told of"), "10.9.9.9:1", False, dated(NOW_MS))


def test_what_is_counted_is_bounded() -> None:
    dials, passed = Dials(dated(NOW_MS)), 0
    for second in range(200):
        for n in range(60):
            peer, host = PeerId(f"p{second}-{n}"), f"10.0.{second}.{n}:1"
            passed += dials.take(peer, host, second % 2 == 0, dated(NOW_MS + 1_000 * second))
    assert passed > 2 * DIALS_COUNTED_MAX
    assert len(dials._of_peer) <= DIALS_COUNTED_MAX
    assert len(dials._to_host) <= DIALS_COUNTED_MAX
