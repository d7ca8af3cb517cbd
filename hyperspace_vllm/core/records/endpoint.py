"""Addresses of nodes. Text is parsed on input, and printed by `str` on output.

An IPv6 address between nodes has brackets: without them, its last group may be a port. In settings they may be missing.
"""

from dataclasses import dataclass
from ipaddress import IPv6Address

from .ids import PeerId, public_key_of

NAME_CHARS_MAX = 253  # of DNS
_EXPECTED = "expected host:port"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A name or an IP address (without brackets), and a TCP port."""

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
        """The endpoint in a setting; ValueError. Resolving it shows whether its host exists."""
        host, port = _split(text)
        return cls(host[1:-1] if host.startswith("[") and host.endswith("]") else host, port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A peer and its address."""

    peer: PeerId
    endpoint: Endpoint

    @classmethod
    def of_setting(cls, text: str) -> "PeerAddress":
        """The peer and address in `<peer id>@host:port`; ValueError, which names the expected form."""
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
