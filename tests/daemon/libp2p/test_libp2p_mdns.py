"""Discovery on the local network by mDNS."""

import pytest

from hyperspace_vllm.daemon.libp2p.libp2p_mdns import peers_in
from hyperspace_vllm.daemon.libp2p.libp2p_node import reachable_hosts
from tests.support.libp2p_members import Member, Members
from tests.support.until import until_async

pytestmark = pytest.mark.io


async def test_nodes_on_one_network_discover_each_other(members: Members) -> None:
    a, b = await members(2, meet=False, mdns=True, network_key=bytes(32))
    (other,) = await members(1, meet=False, mdns=True)
    try:
        await until_async(lambda: b.peer in a.discovered and a.peer in b.discovered, 20)
    except TimeoutError:
        pytest.skip("no multicast on this machine's loopback")
    assert a.discovered == {b.peer: b.host.address}
    assert other.discovered == {}  # a private network has a name of its own
    assert a.host.connected == frozenset()


def test_only_addresses_of_nodes_are_read_from_a_txt_record() -> None:
    peer = Member().peer
    good = f"/ip4/192.0.2.1/tcp/7000/p2p/{peer}".encode()
    records: dict[bytes, bytes | None] = {
        b"dnsaddr": good,
        b"dnsaddr1": f"/ip6/2001:db8::1/tcp/7000/p2p/{peer}".encode(),
        b"dnsaddr2": None,
        b"dnsaddr3": b"\xff/\xff",
        b"dnsaddr4": f"/ip4/192.0.2.1/udp/7000/p2p/{peer}".encode(),
        b"dnsaddr5": b"/ip4/192.0.2.1/tcp/99999/p2p/" + peer.encode(),
        b"dnsaddr6": b"/ip4/192.0.2.1/tcp/1/p2p/12D3KooWnobody",
        b"other": good,
    }
    assert peers_in(records) == [(peer, "192.0.2.1:7000"), (peer, "[2001:db8::1]:7000")]


def test_a_wildcard_is_announced_as_addresses_that_can_be_dialled() -> None:
    assert reachable_hosts("127.0.0.1") == ["127.0.0.1"]
    assert reachable_hosts("::1") == ["::1"]
    for wildcard in ("0.0.0.0", "::"):
        hosts = reachable_hosts(wildcard)
        assert hosts
        assert wildcard not in hosts
