"""Which gossip is delivered and passed on: judged by its author, not by the neighbour that relays it.

    REJECT  no honest node passes it on: it does not decode, is of another network, or is not signed by its author
    IGNORE  of no use to this node: of an unknown author, with a date too far off, or beyond the allowance of its
            author, of the author's host, or of all authors together
    ACCEPT  delivered, and passed on

A rejected message counts against the link; after INVALID_BURST of them the link's messages are dropped (MUTE). An
ignored message counts against no peer: neighbours know different peers and have received different messages. Only
messages that an author has signed use up its allowance, so no peer can use up another's. Peers that this node was only
told of share half of the total, so a peer that invents authors leaves the other half to peers that this node has met.

Rejected: an allowance for each link. A neighbour that relays useless messages, which it cannot recognise as such, then
has none left for its own announcements.
"""

from collections.abc import Callable, Mapping
from enum import Enum, auto

from ..records.announcement import check_announcement, decode_announcement, is_of_later_version
from ..records.errors import ProtocolViolation, Refused
from ..records.ids import NetworkId, PeerId, peer_id, public_key_of
from ..records.limits import (
    GOSSIP_INVALID_BURST,
    GOSSIP_INVALID_PER_S,
    GOSSIP_KIB_A_MESSAGE,
    GOSSIP_OF_ALL_PER_S,
    GOSSIP_OF_AUTHOR_PER_S,
    GOSSIP_OF_SOURCE_PER_S,
    KiB,
)
from ..records.now import Now
from ..records.rank import Acquaintance, Rank
from .allowance import Allowance

BURST_S = 10  # an allowance may be saved up for so long


class Verdict(Enum):
    """What is done with a message."""

    ACCEPT = auto()
    IGNORE = auto()
    REJECT = auto()
    MUTE = auto()  # rejected, and so is everything else that comes over the link


class GossipGate:
    """The gate of one node. `authors` may be set from another thread than the one that judges."""

    def __init__(self, network: NetworkId, now: Now) -> None:
        self._network = network
        self._all = _allowance(GOSSIP_OF_ALL_PER_S, now)
        self._of_source: dict[str, Allowance] = {}
        self._of_author: dict[PeerId, Allowance] = {}
        self._invalid_of: dict[PeerId, Allowance] = {}
        self.authors: Mapping[PeerId, Acquaintance] = {}
        self._pruned: Mapping[PeerId, Acquaintance] = self.authors

    def judge(
        self, link: PeerId, topic: str, author: PeerId, payload: bytes, signed: Callable[[], bool], now: Now
    ) -> Verdict:
        """Judge a message from `link`; `signed()` says whether GossipSub's own signature is `author`'s."""
        invalid = self._invalid_of.get(link)
        if invalid is not None and invalid.left(now) < 1:
            return Verdict.IGNORE
        try:
            return self._judge(topic, author, payload, signed, now)
        except (ProtocolViolation, Refused):
            invalid = self._invalid_of.setdefault(link, Allowance(GOSSIP_INVALID_PER_S, GOSSIP_INVALID_BURST, now))
            invalid.take(1, now)
            return Verdict.MUTE if invalid.left(now) < 1 else Verdict.REJECT

    def acquaintance(self, link: PeerId) -> Acquaintance:
        """How well a neighbour is known; an unknown one counts as one that was only told of."""
        return self.authors.get(link) or Acquaintance(Rank.TOLD, "")

    def forget(self, link: PeerId) -> None:
        """The link is closed."""
        self._invalid_of.pop(link, None)

    def _judge(self, topic: str, author: PeerId, payload: bytes, signed: Callable[[], bool], now: Now) -> Verdict:
        if is_of_later_version(payload, self._network, public_key_of(author)):
            return Verdict.IGNORE
        batch = decode_announcement(payload)
        if batch.topic != topic or batch.network != self._network or peer_id(batch.sender) != author:
            raise Refused("not_its_authors")
        acquaintance = self.authors.get(author)
        cost = message_cost(len(payload))
        # Two signatures are not checked for an author without allowance.
        if acquaintance is None or self._author(author, now).left(now) < cost:
            return Verdict.IGNORE
        if not signed():
            raise Refused("bad_signature")
        try:
            check_announcement(payload, batch, self._network, now.wall_ms)
        except Refused as refused:
            if refused.reason in ("stale", "from_the_future"):
                return Verdict.IGNORE
            raise
        return Verdict.ACCEPT if self._spend(author, acquaintance, cost, now) else Verdict.IGNORE

    def _spend(self, author: PeerId, acquaintance: Acquaintance, cost: float, now: Now) -> bool:
        leave = GOSSIP_OF_ALL_PER_S * BURST_S / 2 if acquaintance.rank is Rank.TOLD else 0
        if not self._author(author, now).take(cost, now):
            return False
        if acquaintance.rank is Rank.LISTED:
            return self._all.take(cost, now)
        of_source = self._of_source.get(acquaintance.source)
        if of_source is None:
            of_source = self._of_source[acquaintance.source] = _allowance(GOSSIP_OF_SOURCE_PER_S, now)
        return of_source.take(cost, now) and self._all.take(cost, now, leave)

    def _author(self, author: PeerId, now: Now) -> Allowance:
        if self._pruned is not self.authors:
            authors = self._pruned = self.authors
            sources = {acquaintance.source for acquaintance in authors.values()}
            self._of_author = {peer: left for peer, left in self._of_author.items() if peer in authors}
            self._of_source = {source: left for source, left in self._of_source.items() if source in sources}
        allowance = self._of_author.get(author)
        if allowance is None:
            allowance = self._of_author[author] = _allowance(GOSSIP_OF_AUTHOR_PER_S, now)
        return allowance


def message_cost(size: int) -> float:
    """How much of an allowance a message of `size` bytes uses: 1, and 1 more for every GOSSIP_KIB_A_MESSAGE."""
    return 1 + size / (GOSSIP_KIB_A_MESSAGE * KiB)


def _allowance(per_s: float, now: Now) -> Allowance:
    return Allowance(per_s, per_s * BURST_S, now)
