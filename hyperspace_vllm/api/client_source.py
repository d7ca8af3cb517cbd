"""The source of a request, as audits count sources (core/peers/findings.py): one client cannot be two sources.

A source is the network of the client's address. All addresses of this host are one source, because a process can use
any address of 127.0.0.0/8, and so are clients without an IP address. uvicorn replaces the connection's address by the
one in `X-Forwarded-For`, by default for any client on this host, and does not keep the original. So an address from the
header counts only if the operator has named the proxies to trust; otherwise it counts as this host.
"""

from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.types import Scope

from ..core.local.response_cache_messages import SOURCE_BYTES_MAX
from .http_headers import RawHeaders

_OWNED_BITS = {4: 24, 6: 48}  # the smallest network that one owner usually has


def source_of(scope: Scope, names_proxies: bool) -> bytes:
    """The source of a request, hashed; `names_proxies`: the operator has named the proxies to trust."""
    client = scope.get("client")
    address = _address(str(client[0])) if client else None
    is_forwarded = address is not None and address in _forwarded_for(scope["headers"])
    if address is None or address.is_loopback or (is_forwarded and not names_proxies):
        return _hashed(b"")
    network = ip_network((address, _OWNED_BITS[address.version]), strict=False)
    return _hashed(network.network_address.packed)


def names_proxies(allowed: str | None) -> bool:
    """Whether this value of uvicorn's FORWARDED_ALLOW_IPS names proxies; "*" would let any client name any address."""
    return bool(allowed) and "*" not in [each.strip() for each in (allowed or "").split(",")]


def _forwarded_for(headers: RawHeaders) -> set[IPv4Address | IPv6Address]:
    values = [value.decode("latin1") for name, value in headers if name == b"x-forwarded-for"]
    named = (_address(_without_port(each.strip())) for value in values for each in value.split(","))
    return {address for address in named if address is not None}


def _without_port(host: str) -> str:
    """As uvicorn reads it: an address, IPv4:port, or [IPv6]:port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _hashed(network: bytes) -> bytes:
    return sha256(network).digest()[:SOURCE_BYTES_MAX]
