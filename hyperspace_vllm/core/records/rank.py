"""How well this node knows a peer.

LISTED  on this node's own lists
MET     it has proved its identity over a connection
TOLD    another peer passed its record on, and nothing else is known of it
"""

from dataclasses import dataclass
from enum import IntEnum


class Rank(IntEnum):
    """Peers of a higher rank are evicted later."""

    TOLD = 0
    MET = 1
    LISTED = 2


class Tier(IntEnum):
    """The order in which this node serves peers."""

    STRANGER = 0
    MEMBER = 1  # holds the network key, and has delivered nothing yet
    PROVEN = 2  # on this node's own lists, or has delivered


@dataclass(frozen=True, slots=True)
class Acquaintance:
    """`source` is the host that the peer connected from, or that of the peer that reported it."""

    rank: Rank
    source: str
