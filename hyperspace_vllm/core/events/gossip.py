"""Gossip: what this node publishes, and what it hears."""

from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.rank import Acquaintance


@dataclass(frozen=True, slots=True)
class Publish:
    """Send `payload` to the subscribers of `topic`. Not answered."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class GossipReceived:
    """A message on one of the two topics; `relay` is the neighbour that it came through, not its author."""

    topic: str
    relay: PeerId
    payload: bytes


@dataclass(frozen=True, slots=True)
class GossipSpoiled:
    """A neighbour passed on more invalid messages than any honest one does; its gossip is ignored."""

    relay: PeerId


@dataclass(frozen=True, slots=True)
class AuthorsChanged:
    """The authors whose gossip is delivered and passed on from now on (gossip_gate.py). Not answered."""

    authors: tuple[tuple[PeerId, Acquaintance], ...]
