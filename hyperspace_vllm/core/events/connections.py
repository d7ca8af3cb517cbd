"""Connections to peers: opened, found, lost."""

from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.reason import Reason


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a connection to `peer` at `address` (host:port). Answered by PeerConnected or ConnectFailed."""

    peer: PeerId
    address: str
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A libp2p connection to `peer` is open; Noise has proved its identity (and the network key, if there is one).

    `host` is the IP address at the other end, '' where the shell does not know it.
    """

    peer: PeerId
    host: str = ""


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """Answers Connect, which is otherwise answered by PeerConnected."""

    peer: PeerId
    reason: Reason  # timeout | unreachable


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close every connection to `peer`. Answered by PeerDisconnected if there was one."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection to `peer` has closed."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDiscovered:
    """A machine of this local network says that `peer` is at host:port (mDNS); nothing of it is proved.

    `told_from` is an IP address that reaches as far as the machine's.
    """

    peer: PeerId
    address: str
    told_from: str
