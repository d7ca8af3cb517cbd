"""Accusations: which peers are said to sign false answers.

    convicted   by this node's own audits (findings.py): its proofs and manifests don't count for CONVICTED_MS
    suspected   by one such audit, or by another node's accusation: all of its answers are audited for SUSPECTED_MS

Only the node that had the prompt can tell whether an answer was false, so an accusation by another node causes audits
and nothing else: the accused peer loses no reputation by it. Each accuser has ACCUSED_MAX places, in which its newest
accusations replace its own oldest ones. Rejected: conviction by several accusers, which one holder of the network key
can be alone, with any number of identities.
"""

from collections import OrderedDict

from ..records.now import Now

SUSPECTED_MS = 3_600_000
ACCUSED_MAX = 16  # by one accuser
ACCUSERS_MAX = 256


class Accusations:
    """Of Ed25519 public keys; `own_key` is never among them. Forgotten when the node ends."""

    def __init__(self, own_key: bytes) -> None:
        self._own_key = own_key
        self._said: OrderedDict[bytes, OrderedDict[bytes, int]] = OrderedDict()  # by each accuser, since when

    def accuse(self, accuser: bytes, accused: bytes, now: Now) -> None:
        """`accuser`, which may be this node, says that `accused` signed a false answer."""
        if accused in (self._own_key, accuser):
            return
        said = self._said.setdefault(accuser, OrderedDict())
        self._said.move_to_end(accuser)
        said[accused] = now.mono_ms
        said.move_to_end(accused)
        if len(said) > ACCUSED_MAX:
            said.popitem(last=False)
        if len(self._said) > ACCUSERS_MAX:
            del self._said[next(other for other in self._said if other != self._own_key)]

    def stand_against(self, key: bytes, now: Now) -> bool:
        """Whether a peer has accused it recently."""
        return any(_lasts(said.get(key), now) for said in self._said.values())

    def accused(self, now: Now) -> set[bytes]:
        """Every accused peer."""
        return {key for said in self._said.values() for key, since_ms in said.items() if _lasts(since_ms, now)}


def _lasts(since_ms: int | None, now: Now) -> bool:
    return since_ms is not None and now.mono_ms - since_ms < SUSPECTED_MS
