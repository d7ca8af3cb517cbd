"""Which of the addresses that peers report may be dialled.

An address in a peer's message is a claim, and every node that believes it dials it. So it must be an IP address (an
honest node resolves its own name; the owner of a name server could lead a name anywhere), and its scope must suit this
node and the peer that reported it. Addresses have scopes: this machine, this link (where clouds keep their metadata
service), a private network, everywhere. A node dials no address of a narrower scope than that of its own address, nor
of a narrower scope than that of the peer that reported it (in a PeerRecord, a DHT answer or mDNS). It passes on no
record with an address that it would not dial, because its peers judge the record by this node's scope. So the nodes of
a fleet in 10.0.0.0/8 dial each other, none of them dials its own loopback, and peers from the internet cannot lead a
node to a private network, not even through a third node. Rejected: refusing private ranges, which fleets use.
"""

from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from ..records.endpoint import Endpoint

_LINK_4 = [  # with what clouds and carriers put next to every machine
    IPv4Network(each) for each in ("169.254.0.0/16", "192.0.0.0/24", "168.63.129.16/32")
]
_PRIVATE_4 = [
    IPv4Network(each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15")
]
_NOWHERE_4 = [IPv4Network(each) for each in ("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4")]
_LINK_6 = IPv6Network("fe80::/10")
_PRIVATE_6 = [IPv6Network(each) for each in ("fc00::/7", "fec0::/10")]
_GLOBAL_6 = IPv6Network("2000::/3")
_NOWHERE_6 = [IPv6Network(each) for each in ("2001::/32", "2001:db8::/32")]  # Teredo wraps IPv4; documentation
# Translators send the last 32 bits on as an IPv4 address. Those of 64:ff9b:1::/48 (RFC 8215) may have them elsewhere.
_TRANSLATED = [IPv6Network(each) for each in ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "::/96")]


class Scope(IntEnum):
    """How far an address reaches."""

    MACHINE = 0
    LINK = 1
    PRIVATE = 2
    GLOBAL = 3


def scope_of(host: str) -> Scope | None:
    """How far an IP address reaches; None: it is not an IP address, or no machine can have it."""
    ip = _ip(host)
    if isinstance(ip, IPv4Address):
        return _scope_4(ip)
    return None if ip is None else _scope_6(ip)


def _scope_4(ip: IPv4Address) -> Scope | None:
    if any(ip in each for each in _NOWHERE_4):
        return None
    if ip.is_loopback:
        return Scope.MACHINE
    if any(ip in each for each in _LINK_4):
        return Scope.LINK
    return Scope.PRIVATE if any(ip in each for each in _PRIVATE_4) else Scope.GLOBAL


def _scope_6(ip: IPv6Address) -> Scope | None:
    if ip.is_loopback:
        return Scope.MACHINE
    if ip in _LINK_6:
        return Scope.LINK
    if any(ip in each for each in _PRIVATE_6):
        return Scope.PRIVATE
    return Scope.GLOBAL if ip in _GLOBAL_6 and not any(ip in each for each in _NOWHERE_6) else None


def may_dial(address: str, own_address: str, told_from: str | None) -> bool:
    """Whether a node reached at `own_address` should dial `address` (both host:port).

    `told_from` is the IP address of the peer that reported it; an unknown one ('') counts as one of the internet.
    None: this node itself has kept the address.
    """
    try:
        endpoint = Endpoint.parse(address)
    except ValueError:
        return False
    if endpoint.port == 0:
        return False
    scope = scope_of(endpoint.host)
    told = Scope.MACHINE if told_from is None else _reach(told_from)
    return scope is not None and scope >= max(_reach(host_of(own_address)), told)


def _reach(host: str) -> Scope:
    """How far `host` reaches; everywhere if that is unknown."""
    scope = scope_of(host)
    return Scope.GLOBAL if scope is None else scope


def host_of(address: str) -> str:
    """The host of host:port, without brackets and in one spelling."""
    host = address.rpartition(":")[0]
    return str(_ip(host) or host)


def source_of(host: str) -> str:
    """The name of the machine at an IP address: the address itself, or for IPv6 its /64, which one machine may fill."""
    ip = _ip(host)
    return str(ip_network((ip, 64), strict=False)) if isinstance(ip, IPv6Address) else str(ip or host)


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a packet to `host` reaches: the IPv4 address inside an IPv6 address, if there is one."""
    try:
        ip = ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return None
    if isinstance(ip, IPv4Address):
        return ip
    if ip.scope_id is not None and not ip.is_link_local:
        return None
    if int(ip) > 1 and any(ip in each for each in _TRANSLATED):  # ::1 is loopback, :: is nowhere
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.sixtofour or ip
