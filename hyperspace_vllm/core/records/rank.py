"""How well this node knows a peer.

LISTED  on this node's own lists
MET     it has shown over a connection who it is
TOLD    another peer passed its record on, and nothing else speaks for it
"""

from dataclasses import dataclass
from enum import IntEnum


class Rank(IntEnum):
    """Higher ones stay longer."""

    TOLD = 0
    MET = 1
    LISTED = 2


class Tier(IntEnum):
    """Whose needs come first where peers share what this node has."""

    STRANGER = 0
    MEMBER = 1  # holds the network key, and has delivered nothing yet
    PROVEN = 2  # on this node's own lists, or has delivered


@dataclass(frozen=True, slots=True)
class Acquaintance:
    """`source` is the host that the peer connected from, or that of a peer that told of it."""

    rank: Rank
    source: str
