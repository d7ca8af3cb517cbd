"""Which of the addresses that strangers advertise are worth dialling.

A record's address is its author's claim, and every node that believes it dials it. So it has to be an IP address (an
honest node resolves its own name; whoever's name server decides where a name leads can lead it anywhere), and nothing
that only means something on this machine (loopback; link-local, where clouds keep their metadata service), unless this
node itself is reached at such an address. Rejected: refusing private ranges, which is where fleets live.
"""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_BROADCAST = IPv4Address("255.255.255.255")


def may_dial(address: str, own_address: str) -> bool:
    """Whether a node that is reached at `own_address` should dial `address` (both host:port)."""
    host, _, port = address.rpartition(":")
    ip = _ip(host)
    if ip is None or not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        return False
    if ip.is_unspecified or ip.is_multicast or ip == _BROADCAST:
        return False
    if not ip.is_loopback and not ip.is_link_local:
        return True
    own = _ip(own_address.rpartition(":")[0])
    return own is not None and (own.is_loopback, own.is_link_local) == (ip.is_loopback, ip.is_link_local)


def source_of(host: str) -> str:
    """What stands for the machine at an IP address: the address itself, of IPv6 the /64 that one machine may fill."""
    ip = _ip(host)
    return str(ip_network((ip, 64), strict=False)) if isinstance(ip, IPv6Address) else str(ip or host)


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        ip = ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return mapped or ip
