"""Which inbound connections a node keeps when it has too many: those of peers on its own lists, then of peers that have
delivered, then of members, then the rest. slots.py decides among equals.

A peer that sends queries gains nothing by them: otherwise 48 identities with an occasional query would keep every new
peer out. A peer is judged once it has greeted. Peers that have not greeted have a few places of their own, so that
neither kind can take the other's places. libp2p's own bound (PEER_CONNECTIONS_INBOUND_MAX) is above the sum, so that a
new connection can always be judged.
"""

from collections.abc import Iterable

from ..records.limits import GREETED_INBOUND_MAX, UNGREETED_INBOUND_MAX
from .peer_table import Peer
from .slots import Place, by_value, evicted_for
from .trust import Trust


def select_replaced(peers: Iterable[Peer], newcomer: Peer, trust: Trust) -> Peer | None:
    """The peer whose connection closes for that of `newcomer`, possibly `newcomer` itself; None: there is room."""
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
    evicted = evicted_for({peer: _place(known, trust) for peer, known in rivals.items()}, _place(newcomer, trust))
    return newcomer if evicted is None else rivals[evicted]


def least_useful_first(peers: list[Peer], trust: Trust) -> list[Peer]:
    """Connected peers by usefulness; those that this node chose come last."""
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
