"""When this node asks which neighbour for its part of the registry.

Every SYNC_MS one neighbour, each one that greets, and a neighbour whose last answer was of use but not all, soon again.
"""

from ..events.peer_requests import Send
from ..peers.membership import Ask, Membership
from ..records.ids import PeerId
from ..records.now import Now
from .registry import Registry

SYNC_MS = 2_000
SYNC_TIMEOUT_MS = 3_000
SYNC_AGAIN_MS = 100  # from an answer that was not all to the next question


class RegistrySync:
    """`ask` makes a Send and remembers it, unless that question is open; `is_on` False: a Redis registry is used."""

    def __init__(self, registry: Registry, members: Membership, ask: Ask, is_on: bool, now: Now) -> None:
        self._registry = registry
        self._members = members
        self._ask = ask
        self._is_on = is_on
        self._sync_at_ms = now.mono_ms + SYNC_MS
        self._again_at_ms: dict[PeerId, int] = {}

    def with_peer(self, peer: PeerId, now: Now) -> list[Send]:
        """Ask a peer for what this node lacks."""
        return self._ask(peer, self._registry.want(), SYNC_TIMEOUT_MS, now) if self._is_on else []

    def go_on(self, now: Now) -> list[Send]:
        """Ask again those that had more, when it is time."""
        for peer in self._registry.whom_to_ask_again():
            self._again_at_ms.setdefault(peer, now.mono_ms + SYNC_AGAIN_MS)
        due = [peer for peer, at_ms in self._again_at_ms.items() if at_ms <= now.mono_ms]
        for peer in due:
            del self._again_at_ms[peer]
        return [send for peer in due for send in self.with_peer(peer, now)]

    def on_tick(self, now: Now) -> list[Send]:
        """Ask those that had more, and one neighbour if it is time."""
        sends = self.go_on(now)
        if now.mono_ms >= self._sync_at_ms:
            self._sync_at_ms = now.mono_ms + SYNC_MS
            neighbour = self._members.any_neighbour()
            sends += self.with_peer(neighbour.peer, now) if neighbour is not None else []
        return sends

    def next_deadline_ms(self) -> int:
        """When `on_tick` has something to do."""
        return min([self._sync_at_ms, *self._again_at_ms.values()])
