"""Who makes room for a newcomer when all inbound places are taken."""

import pytest

from hyperspace_vllm.core.peers.slots import (
    ARRIVALS_BURST,
    ARRIVALS_PER_S,
    FAIR_S,
    ORIGINS_MAX,
    PREFIX_HOSTS,
    Handshakes,
    Place,
    address_prefix,
    evicted_for,
)


@pytest.mark.parametrize(
    ("host", "prefix"),
    [
        ("203.0.113.9", "203.0.113.0/24"),
        ("127.0.0.1", "127.0.0.0/24"),
        ("127.0.1.1", "127.0.1.0/24"),
        ("2001:db8:1:2::3", "2001:db8:1::/48"),
        ("::1", "::/48"),
        ("fe80::1%eth0", "fe80::/48"),
        ("::ffff:203.0.113.9", "203.0.113.0/24"),  # as an IPv6 listener names an IPv4 peer
        ("", ""),
        ("no address", ""),
    ],
)
def test_addresses_are_counted_by_the_network_that_one_party_usually_has(host: str, prefix: str) -> None:
    assert address_prefix(host) == prefix


CROWD, NEAR, ALONE, NEW = "203.0.113.1", "203.0.113.2", "198.51.100.1", "192.0.2.1"


@pytest.mark.parametrize(
    ("places", "newcomer", "evicted"),
    [
        ({}, Place(NEW, 9), None),
        ({1: Place(CROWD, 5), 2: Place(CROWD, 3), 3: Place(ALONE, 1)}, Place(NEW, 9), 2),  # the crowd's idlest
        ({1: Place(CROWD, 5, 1), 2: Place(CROWD, 3, 1), 3: Place(ALONE, 1)}, Place(NEW, 9), 3),  # worth comes first
        ({1: Place(CROWD, 5, 1), 2: Place(ALONE, 3, 1)}, Place(NEW, 9), None),  # the others are worth more
        ({1: Place(CROWD, 5, 1), 2: Place(ALONE, 3, 2)}, Place(NEW, 9, 2), 1),
        ({1: Place(ALONE, 5), 2: Place(NEW, 7)}, Place(NEW, 9), 2),  # with the newcomer, its host is the crowd
        ({1: Place(CROWD, 5), 2: Place(CROWD, 3)}, Place(CROWD, 9), 2),
        ({1: Place(CROWD, 5), 2: Place(NEAR, 4), 3: Place(ALONE, 3)}, Place(NEW, 9), 2),  # a crowded prefix
        ({1: Place(CROWD, 5), 2: Place(NEAR, 4), 3: Place(ALONE, 3), 4: Place(ALONE, 6)}, Place(NEW, 9), 3),
    ],
)
def test_a_newcomer_displaces_the_least_of_the_most_crowded(
    places: dict[int, Place], newcomer: Place, evicted: int | None
) -> None:
    assert evicted_for(places, newcomer) == evicted


@pytest.mark.parametrize("honest_hosts", ["10.0.{}.1", "10.0.0.{}"])  # spread, or one network
def test_a_host_with_any_number_of_connections_displaces_only_its_own(honest_hosts: str) -> None:
    honest = {number: Place(honest_hosts.format(number), 0) for number in range(20)}
    places: dict[int, Place] = dict(honest)
    for number in range(100, 1_000):
        if len(places) >= 24:
            evicted = evicted_for(places, Place(CROWD, number))
            assert evicted is not None
            del places[evicted]
        places[number] = Place(CROWD, number)
    assert honest.items() <= places.items()


def begin(handshakes: Handshakes, host: str, now_s: float, ended: list[str]) -> int | None:
    return handshakes.begin(host, now_s, lambda: ended.append(host))


def test_silent_connections_of_one_host_end_before_those_of_others() -> None:
    handshakes, ended = Handshakes(8), list[str]()
    for number in range(8):
        begin(handshakes, "203.0.113.1", number, ended)
    assert begin(handshakes, "198.51.100.1", 8, ended) is not None
    assert ended == ["203.0.113.1"]
    for number in range(8, 40):
        begin(handshakes, f"203.0.113.{number}", number, ended)
    assert len(handshakes) == 8
    assert "198.51.100.1" not in ended


def test_a_fleet_that_arrives_at_once_is_served_in_turn() -> None:
    handshakes, ended = Handshakes(4), list[str]()
    places = [begin(handshakes, f"10.0.0.{number}", 0, ended) for number in range(10)]
    assert [place is not None for place in places] == [True] * 4 + [False] * 6
    assert ended == []
    assert begin(handshakes, "10.0.0.9", FAIR_S, ended) is not None
    assert ended == ["10.0.0.0"]


def test_a_handshake_that_is_over_makes_room() -> None:
    handshakes, ended = Handshakes(2), list[str]()
    first = begin(handshakes, "203.0.113.1", 0, ended)
    assert first is not None
    begin(handshakes, "203.0.113.2", 0, ended)
    handshakes.end(first)
    handshakes.end(first)
    begin(handshakes, "203.0.113.3", 0, ended)
    assert (ended, len(handshakes)) == ([], 2)


def test_what_a_host_or_a_prefix_opens_beyond_its_rate_is_not_begun() -> None:
    handshakes = Handshakes(1_000)

    def arrive(host: str, now_s: float) -> int:
        """How many of a thousand are begun, each of which ends at once."""
        begun = [begin(handshakes, host, now_s, []) for _ in range(1_000)]
        for number in begun:
            if number is not None:
                handshakes.end(number)
        return sum(number is not None for number in begun)

    assert arrive("127.0.0.1", 0) == ARRIVALS_BURST
    assert arrive("127.0.0.2", 0) == ARRIVALS_BURST  # one host of a network uses up no other's
    assert arrive("127.0.0.1", 2) == 2 * ARRIVALS_PER_S
    more = sum(arrive(f"127.0.0.{host}", 2) for host in range(3, 256))  # all that is left of their network's
    assert more == PREFIX_HOSTS * ARRIVALS_BURST - 2 * ARRIVALS_PER_S
    assert arrive("127.0.1.1", 2) == ARRIVALS_BURST
    assert arrive("2001:db8:0:1::1", 2) == ARRIVALS_BURST
    assert arrive("2001:db8:0:1::2", 2) == 0  # of one /64


def test_the_hosts_and_prefixes_that_are_counted_are_bounded() -> None:
    handshakes = Handshakes(8)
    for number in range(3 * ORIGINS_MAX):
        begin(handshakes, f"10.{number >> 8}.{number & 255}.1", 0, [])
    assert len(handshakes._arrivals) == ORIGINS_MAX
