"""Where a node is reached. Text is parsed where it comes in, and printed by `str` where it goes out.

An IPv6 address stands in brackets between nodes: without them, its last group may be a port. What people write in
settings may lack them.
"""

from dataclasses import dataclass
from ipaddress import IPv6Address

from .ids import PeerId, public_key_of

NAME_CHARS_MAX = 253  # of DNS
_EXPECTED = "expected host:port"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A name or an IP address (without brackets), and a port of TCP."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """The endpoint that `host:port` names; ValueError."""
        host, port = _split(text)
        if host.startswith("[") and host.endswith("]"):
            return cls(str(IPv6Address(host[1:-1])), port)
        if ":" in host or "/" in host or len(host) > NAME_CHARS_MAX or any(char.isspace() for char in host):
            raise ValueError(_EXPECTED)
        return cls(host, port)

    @classmethod
    def of_setting(cls, text: str) -> "Endpoint":
        """The endpoint that a person wrote: what is no host is found out when it is resolved. ValueError."""
        host, port = _split(text)
        return cls(host[1:-1] if host.startswith("[") and host.endswith("]") else host, port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A peer, and where it is reached."""

    peer: PeerId
    endpoint: Endpoint

    @classmethod
    def of_setting(cls, text: str) -> "PeerAddress":
        """What `<peer id>@host:port` names; ValueError, which says what is expected."""
        peer, at, endpoint = text.partition("@")
        try:
            reached_at = Endpoint.of_setting(endpoint if at else "")
        except ValueError:
            raise ValueError(f"<peer id>@host:port, not {text!r}") from None
        try:
            public_key_of(peer)
        except ValueError as error:
            raise ValueError(f"<peer id>@host:port: {error}") from error
        return cls(PeerId(peer), reached_at)

    def __str__(self) -> str:
        return f"{self.peer}@{self.endpoint}"


def _split(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise ValueError(_EXPECTED)
    return host, int(port)
