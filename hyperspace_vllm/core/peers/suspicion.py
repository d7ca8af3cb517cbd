"""Who is said to sign false answers, and who was caught at it.

    convicted   by this node's own audits (findings.py): its proofs and manifests don't count for CONVICTED_MS
    suspected   by one such audit, or by another's word: its answers are all audited for SUSPECTED_MS

Nobody but the node that had the prompt can tell whether an answer was false, so another's word is worth audits and
nothing else: no reputation is lost by it, and slander costs the slandered nothing. Each accuser has ACCUSED_MAX places,
in which its newest accusations push out its own oldest. Rejected: conviction once several accuse, which whoever holds
the network key could arrange alone, under as many names as it likes.
"""

from collections import OrderedDict

from ..records.limits import PEERS_KNOWN_MAX
from ..records.now import Now

SUSPECTED_MS = 3_600_000
CONVICTED_MS = 24 * 3_600_000  # the life of a response: what it signed before has expired by then
ACCUSED_MAX = 16  # by one accuser
ACCUSERS_MAX = 256


class Suspicion:
    """Of Ed25519 public keys; `own_key` is never among them. Forgotten when the node ends."""

    def __init__(self, own_key: bytes) -> None:
        self._own_key = own_key
        self._convicted: OrderedDict[bytes, int] = OrderedDict()  # since when
        self._accused: OrderedDict[bytes, OrderedDict[bytes, int]] = OrderedDict()  # by each accuser, since when

    def convict(self, accused: bytes, now: Now) -> None:
        """This node's own audits convict it."""
        if accused != self._own_key:
            _note(self._convicted, accused, now, PEERS_KNOWN_MAX)

    def accuse(self, accuser: bytes, accused: bytes, now: Now) -> None:
        """`accuser`, which may be this node, says that `accused` signed a false answer."""
        if accused in (self._own_key, accuser):
            return
        said = self._accused.setdefault(accuser, OrderedDict())
        self._accused.move_to_end(accuser)
        _note(said, accused, now, ACCUSED_MAX)
        if len(self._accused) > ACCUSERS_MAX:
            del self._accused[next(other for other in self._accused if other != self._own_key)]

    def is_convicted(self, public_key: bytes, now: Now) -> bool:
        """Whether nothing that it signed counts."""
        return _lasts(self._convicted.get(public_key), CONVICTED_MS, now)

    def suspects(self, public_key: bytes, now: Now) -> bool:
        """Whether all of its answers are to be audited."""
        said = (accused.get(public_key) for accused in self._accused.values())
        return self.is_convicted(public_key, now) or any(_lasts(at, SUSPECTED_MS, now) for at in said)

    def suspected(self, now: Now) -> int:
        """How many are suspected or convicted, for status."""
        known = {*self._convicted, *(key for accused in self._accused.values() for key in accused)}
        return sum(self.suspects(key, now) for key in known)


def _note(since_ms: OrderedDict[bytes, int], key: bytes, now: Now, at_most: int) -> None:
    since_ms[key] = now.mono_ms
    since_ms.move_to_end(key)
    if len(since_ms) > at_most:
        since_ms.popitem(last=False)


def _lasts(since_ms: int | None, for_ms: int, now: Now) -> bool:
    return since_ms is not None and now.mono_ms - since_ms < for_ms
