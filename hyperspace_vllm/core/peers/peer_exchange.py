"""Peer exchange (PEX): which records a node asks for, and which ones it passes on."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator

from ..records.limits import PEERS_KNOWN_MAX, PEX_OF_SOURCE_MAX, PEX_RECORDS_MAX
from ..records.peer_record import PeerRecord
from ..records.peer_wire import KNOWN_BYTES, Peers, WantPeers
from ..records.rank import Rank
from .peer_table import NEVER_MS, Peer


def want_peers(known: Iterable[PeerRecord], own: PeerRecord) -> WantPeers:
    """Ask for records newer than these."""
    records = [*known, own][-PEERS_KNOWN_MAX:]
    return WantPeers(b"".join(record.public_key[:8] + record.sequence.to_bytes(8, "big") for record in records))


def answer_peers(want: WantPeers, usable: Iterable[Peer], rng: random.Random) -> Peers:
    """Some records that the asker lacks."""
    size = KNOWN_BYTES
    theirs = {want.known[at : at + 8]: want.known[at + 8 : at + size] for at in range(0, len(want.known), size)}
    lacking = [
        known.raw
        for known in _worth_telling(usable)
        if known.record is not None
        and theirs.get(known.record.public_key[:8], b"") < known.record.sequence.to_bytes(8, "big")
    ]
    if len(lacking) > PEX_RECORDS_MAX:
        lacking = rng.sample(lacking, PEX_RECORDS_MAX)
    return Peers(tuple(lacking))


def _worth_telling(usable: Iterable[Peer]) -> Iterator[Peer]:
    """Peers that this node has met itself: what a peer invents gets no further than to those who asked it.

    Only records whose addresses it may dial: the asker judges them by where this node is, not by where the peer is.
    Of those met at one host, which may be one machine under many names, the few that were known first.
    """
    told: Counter[str] = Counter()
    for known in usable:
        if (
            known.met
            and known.may_all_be_dialled
            and (known.acquaintance.rank is Rank.LISTED or told[known.source] < PEX_OF_SOURCE_MAX)
        ):
            told[known.source] += 1
            yield known


def whose_turn(neighbours: list[Peer]) -> Peer:
    """Whom to ask for records: of the host that was asked longest ago, for one host may be most of the neighbours."""
    asked_ms: dict[str, int] = {}
    for known in neighbours:
        asked_ms[known.source] = max(asked_ms.get(known.source, NEVER_MS), known.exchanged_at_ms)
    return min(neighbours, key=lambda known: (asked_ms[known.source], known.exchanged_at_ms))
