"""Discovery on the local network by mDNS, as libp2p's specification has it (opt-in).

    <random name>._p2p._udp.local.  TXT  dnsaddr=/ip4/192.0.2.1/tcp/7000/p2p/12D3KooW…

A private network has its own service type, `_p2p-<8 hex digits of SHA-256 of its key>._udp.local.`. zeroconf runs on
the node's own loop; py-libp2p's use of it blocks its thread for seconds. Discovered peers are unsigned: connecting
proves them.

zeroconf remembers every name and every changed TTL that any host of the network sends. So after a number of records it
is closed with all that it remembers, and started again a minute after its last start at the earliest. Until then the
node neither hears nor answers; its connections are not affected.
"""

import asyncio
import logging
import secrets
import socket
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from zeroconf import IPVersion, RecordUpdate, RecordUpdateListener, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from ...core.peers.address import Scope, scope_of
from ...core.records.endpoint import Endpoint
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import PeerId, public_key_of, sha256
from .libp2p_node import reachable_hosts

RECORDS_MAX = 10_000  # heard, of any kind and from all hosts together; 700 bytes each
REOPEN_S = 60.0  # between two starts of zeroconf
NAMES_MAX = 256  # names remembered; the oldest make room
LOOKUPS_MAX = 8  # at once
LOOKUP_MS = 2_000
ADDRESSES_MAX = 8
CLOSE_S = 2.0

logger = logging.getLogger(__name__)


class Mdns:
    """Announces one node and reports others."""

    def __init__(
        self, peer: PeerId, address: str, network_key: bytes | None, on_discovered: Callable[[PeerId, str, str], None]
    ) -> None:
        group = f"-{sha256(b'hyperspace/mdns/1', network_key).hex()[:8]}" if network_key is not None else ""
        self._kind = f"_p2p{group}._udp.local."
        self._name = f"{secrets.token_hex(16)}.{self._kind}"
        self._peer = peer
        self._address = address
        self._on_discovered = on_discovered
        self._told_from = ""
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._lookups: set[asyncio.Task[None]] = set()
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._opened_at = 0.0
        self._records = 0
        self._opening_again: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Announce and listen; on a machine without multicast it only logs that there is none."""
        self._opened_at, self._records = asyncio.get_running_loop().time(), 0
        own = Endpoint.parse(self._address)
        hosts = [each for each in reachable_hosts(own.host) if ":" not in each]
        # zeroconf doesn't report which link an answer came from, so assume the one that reaches furthest.
        self._told_from = max(hosts, key=lambda each: scope_of(each) or Scope.MACHINE, default="")
        properties = {
            f"dnsaddr{number or ''}": f"/ip4/{each}/tcp/{own.port}/p2p/{self._peer}"
            for number, each in enumerate(hosts)
        }
        try:
            self._zeroconf = AsyncZeroconf(interfaces=hosts, ip_version=IPVersion.V4Only)
            self._zeroconf.zeroconf.async_add_listener(_Heard(self._on_records), None)
            await self._zeroconf.async_register_service(
                AsyncServiceInfo(
                    self._kind,
                    self._name,
                    port=own.port,
                    properties=properties,
                    server=f"{self._name.partition('.')[0]}.local.",
                    addresses=[socket.inet_aton(each) for each in hosts],
                )
            )
            self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, self._kind, handlers=[self._on_change])
        except Exception as error:  # zeroconf raises errors of any kind
            logger.warning("no discovery by mDNS: %r", error)

    async def close(self) -> None:
        """Withdraw the announcement."""
        if self._opening_again is not None:
            self._opening_again.cancel()
        await self._shut()

    def _on_records(self, count: int) -> None:
        self._records += count
        if self._records > RECORDS_MAX and self._opening_again is None:
            logger.warning("mDNS: more than %d records heard; discovery begins anew within a minute", RECORDS_MAX)
            self._opening_again = asyncio.get_running_loop().create_task(self._open_again())

    async def _open_again(self) -> None:
        await self._shut()
        await asyncio.sleep(self._opened_at + REOPEN_S - asyncio.get_running_loop().time())
        self._opening_again = None
        await self.start()

    async def _shut(self) -> None:
        for lookup in self._lookups:
            lookup.cancel()
        with suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                if self._browser is not None:
                    await self._browser.async_cancel()  # first: it is the browser that remembers without a bound
                if self._zeroconf is not None:
                    await self._zeroconf.async_close()
        self._browser, self._zeroconf = None, None
        self._seen.clear()

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            self._seen.pop(name, None)
        elif name != self._name and name not in self._seen and len(self._lookups) < LOOKUPS_MAX:
            self._seen[name] = None
            if len(self._seen) > NAMES_MAX:
                self._seen.popitem(last=False)
            lookup = asyncio.get_running_loop().create_task(self._look_up(zeroconf, name))
            self._lookups.add(lookup)
            lookup.add_done_callback(self._lookups.discard)

    async def _look_up(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(self._kind, name)
        try:
            answered = await info.async_request(zeroconf, LOOKUP_MS)
        except Exception as error:  # zeroconf raises errors of any kind
            logger.debug("a name of mDNS was not looked up: %r", error)
            return
        for peer, address in peers_in(info.properties) if answered else ():
            if peer != self._peer:
                self._on_discovered(peer, address, self._told_from)


class _Heard(RecordUpdateListener):
    """Calls `heard` with the number of records in each packet."""

    def __init__(self, heard: Callable[[int], None]) -> None:
        super().__init__()
        self._heard = heard

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        self._heard(len(records))


def peers_in(properties: dict[bytes, bytes | None]) -> list[tuple[PeerId, str]]:
    """The nodes that a TXT record names, with their `host:port`; everything else in it is ignored."""
    found = []
    for name, value in list(properties.items())[:ADDRESSES_MAX]:
        parts = (value or b"").decode("ascii", "replace").split("/")
        if not name.startswith(b"dnsaddr") or len(parts) != 7 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
            continue
        address = f"[{parts[2]}]:{parts[4]}" if parts[1] == "ip6" else f"{parts[2]}:{parts[4]}"
        with suppress(ValueError, ProtocolViolation):
            Endpoint.parse(address)
            public_key_of(parts[6])
            found.append((PeerId(parts[6]), address))
    return found
