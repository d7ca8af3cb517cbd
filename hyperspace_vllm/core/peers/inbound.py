"""Which inbound connections a node keeps when it has too many: of peers on its own lists, of those that have delivered,
of members, of the rest; slots.py says which of equals.

Being asked is no merit: 48 identities that ask a query now and then would otherwise keep every newcomer out. A peer is
judged when it has greeted; those that have not yet have a few places of their own, so that neither kind can take the
other's. libp2p's own bound (PEER_CONNECTIONS_INBOUND_MAX) is above the sum, so that there is always room to be judged.
"""

from collections.abc import Iterable

from ..records.limits import GREETED_INBOUND_MAX, UNGREETED_INBOUND_MAX
from .peer_table import Peer
from .slots import Place, by_value, whom_to_evict
from .trust import Trust


def who_makes_room(peers: Iterable[Peer], newcomer: Peer, trust: Trust) -> Peer | None:
    """Whose connection closes for that of `newcomer`, who may be it; None: there is room for all."""
    if newcomer.outbound or not newcomer.connected:
        return None
    greeted = newcomer.record is not None
    rivals = {
        known.peer: known
        for known in peers
        if _has_place(known) and (known.record is not None) == greeted and known is not newcomer
    }
    if len(rivals) < (GREETED_INBOUND_MAX if greeted else UNGREETED_INBOUND_MAX):
        return None
    evicted = whom_to_evict({peer: _place(known, trust) for peer, known in rivals.items()}, _place(newcomer, trust))
    return newcomer if evicted is None else rivals[evicted]


def least_useful_first(peers: list[Peer], trust: Trust) -> list[Peer]:
    """Connected peers, those that this node chose last."""
    order = by_value({at: _place(known, trust) for at, known in enumerate(peers)})
    return sorted((peers[at] for at in order), key=lambda known: known.outbound)


def _has_place(known: Peer) -> bool:
    return known.connected and not known.outbound and not known.dismissed


def _place(known: Peer, trust: Trust) -> Place:
    return Place(known.source, known.connected_at_ms, _worth(known, trust))


def _worth(known: Peer, trust: Trust) -> int:
    if known.listed or known.bootstrap:
        return 3
    if trust.standings.has_earned(known.peer):
        return 2
    return int(known.member)
