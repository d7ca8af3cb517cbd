"""Discovery on the local network by mDNS."""

import asyncio
import socket
import struct
import time

import pytest

from hyperspace_vllm.daemon.libp2p import libp2p_mdns
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


class Shouting:
    """Sends PTR records of ever new names, or of one name with ever new TTLs, under a type of service."""

    def __init__(self, kind: str, renames: bool) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._kind = b"".join(bytes([len(label)]) + label for label in kind.rstrip(".").encode().split(b".")) + b"\0"
        self._renames = renames
        self._number = 0

    def packet(self, records: int) -> None:
        """Send one packet of so many records."""
        data = struct.pack("!6H", 0, 0x8400, 0, records, 0, 0)
        for place in range(records):
            self._number += 1
            label = b"%x" % (self._number if self._renames else 0)
            target = bytes([len(label)]) + label + b"\xc0\x0c"
            ttl = 0x7FFFFFFF - 30 * self._number
            data += (b"\xc0\x0c" if place else self._kind) + struct.pack("!HHIH", 12, 1, ttl, len(target)) + target
        self._socket.sendto(data, ("127.0.0.1", 5353))

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("renames", [True, False], ids=["new names", "new TTLs"])
async def test_what_hosts_of_the_network_shout_is_forgotten_in_time_and_not_heard_for_a_while(
    monkeypatch: pytest.MonkeyPatch, renames: bool, caplog: pytest.LogCaptureFixture
) -> None:
    records, most = 1000, 0
    monkeypatch.setattr(libp2p_mdns, "RECORDS_MAX", records)
    monkeypatch.setattr(libp2p_mdns, "REOPEN_S", 4.0)
    mdns, starts = libp2p_mdns.Mdns(Member().peer, "127.0.0.1:7000", None, lambda *_: None), 0
    start = mdns.start

    async def counted() -> None:
        nonlocal starts
        starts += 1
        await start()

    monkeypatch.setattr(mdns, "start", counted)
    began = time.monotonic()
    await mdns.start()
    shouting = Shouting(mdns._kind, renames)
    try:
        await asyncio.sleep(0.5)
        if mdns._browser is None:
            pytest.skip("no multicast on this machine's loopback")
        while starts < 3:
            shouting.packet(100)
            await asyncio.sleep(0.02)
            assert time.monotonic() - began < 30
            if mdns._browser is not None:
                most = max(most, len(mdns._browser.query_scheduler._query_heap))
    finally:
        shouting.close()
        await mdns.close()
    assert 0 < most <= 2 * records  # the packets that were on their way
    assert time.monotonic() - began >= 8
    assert "mDNS: more than 1000 records heard" in caplog.text


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
