"""The order of peers' queries: a few places in all, fewer for one peer, and fewest for all unknown peers together.

A query waits for a place, in its turn; peers with standing go before unknown peers, however many of those wait.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass

ANSWERS_MAX = 16  # being made at once, including those that no peer waits for any more
PEER_ANSWERS_MAX = 2
STRANGERS_ANSWERS_MAX = 4


@dataclass(frozen=True, slots=True)
class AskingPeer:
    """The asking peer, or '' for this node itself, which may use all places."""

    peer: str
    is_member: bool  # it may get responses that are shared with the network
    has_standing: bool


OWN_NODE = AskingPeer("", True, True)


class AnswerPlaces:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._strangers = 0
        self._waiting: list[tuple[AskingPeer, asyncio.Future[None]]] = []

    async def take(self, asker: AskingPeer) -> None:
        """Return when the peer has a place, which `free` gives back."""
        if self._has_room(asker):
            self._count(asker, 1)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((asker, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came meanwhile
                self.free(asker)
            raise
        finally:
            self._waiting = [each for each in self._waiting if each[1] is not turn]

    def free(self, asker: AskingPeer) -> None:
        """Give a place back, to the next peer that waits."""
        self._count(asker, -1)
        for waiting, turn in sorted(self._waiting, key=lambda each: not each[0].has_standing):
            if not turn.done() and self._has_room(waiting):
                self._count(waiting, 1)
                turn.set_result(None)

    def _has_room(self, asker: AskingPeer) -> bool:
        if self._taken.total() >= ANSWERS_MAX:
            return False
        if not asker.has_standing and self._strangers >= STRANGERS_ANSWERS_MAX:
            return False
        return not asker.peer or self._taken[asker.peer] < PEER_ANSWERS_MAX

    def _count(self, asker: AskingPeer, change: int) -> None:
        self._taken[asker.peer] += change
        if not self._taken[asker.peer]:
            del self._taken[asker.peer]
        if not asker.has_standing:
            self._strangers += change
