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
    """Some records that the requester lacks."""
    size = KNOWN_BYTES
    theirs = {want.known[at : at + 8]: want.known[at + 8 : at + size] for at in range(0, len(want.known), size)}
    lacking = [
        known.raw
        for known in _shareable(usable)
        if known.record is not None
        and theirs.get(known.record.public_key[:8], b"") < known.record.sequence.to_bytes(8, "big")
    ]
    if len(lacking) > PEX_RECORDS_MAX:
        lacking = rng.sample(lacking, PEX_RECORDS_MAX)
    return Peers(tuple(lacking))


def _shareable(usable: Iterable[Peer]) -> Iterator[Peer]:
    """Peers that this node has met itself, so that an invented peer spreads no further than one hop.

    Only records whose addresses this node may dial: the requester judges them by this node's address, not by the
    peer's. Of the peers met at one host, which may be one machine with many identities, the few that were known first.
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


def next_to_ask(neighbours: list[Peer]) -> Peer:
    """The neighbour to ask for records: of the host asked longest ago, as one host may have most of the neighbours."""
    asked_ms: dict[str, int] = {}
    for known in neighbours:
        asked_ms[known.source] = max(asked_ms.get(known.source, NEVER_MS), known.exchanged_at_ms)
    return min(neighbours, key=lambda known: (asked_ms[known.source], known.exchanged_at_ms))
