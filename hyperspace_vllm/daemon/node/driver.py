"""One node's shell around its core: events in, effects out, the timer, and whether the network is joined.

Nothing here decides. What fails becomes an event and a metric, never an exception in the loop. Joining the network
takes seconds; what happens in it before waits for the join (early_events.py).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Protocol, get_args

from ...core.events.conduct import AnswerAudited, ChargePeer
from ...core.events.known_peers import KvPeersChanged
from ...core.events.node_state import NetworkLeft, Tick
from ...core.events.vocabulary import Effect, Event, NetworkEvent, PrefixEffect
from ...core.node.node import Node
from ...core.response.open_lookups import LookupEvent
from .. import clock
from ..start_error import StartError
from .early_events import EarlyEvents
from .joined_network import Joined
from .network_effects import NetworkEffects

log = logging.getLogger(__name__)

JOIN_AGAIN_S = 10.0
TICK_LATE_S = 0.0005  # the clock rounds down
TICK_EVERY_S = 0.001  # at most

_NEED_NO_NETWORK = (AnswerAudited, *get_args(LookupEvent))

Join = Callable[[AsyncExitStack], Awaitable[Joined]]


class PerformsPrefixes(Protocol):
    """What performs prefix effects (PrefixEffects): built only where KV is cached, because it needs native code."""

    def note(self, event: Event, /) -> None:
        """The core is about to handle an event."""

    def perform(self, effect: PrefixEffect | KvPeersChanged, /) -> None:
        """Do what the core decided."""

    async def close(self) -> None:
        """End everything."""


class Driver:
    """Everything happens on the loop that it was built on; `submit` is its door. Events wait until `begin`."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.events = 0
        self._network: NetworkEffects | None = None
        self._prefixes: PerformsPrefixes | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Event] = deque()
        self._early = EarlyEvents()
        self._joined: Joined | None = None
        self._failure = ""  # of the last attempt to join
        self._has_left = False
        self._handling = False
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, network: NetworkEffects, prefixes: PerformsPrefixes | None) -> None:
        """From now on these perform what the core decides; `prefixes` is None where no KV is cached."""
        self._network, self._prefixes = network, prefixes
        self._go_on()

    def submit(self, event: Event) -> None:
        """Let the core handle an event and perform what it decides, before anything else happens on the loop."""
        if not self._closed:
            self._queue.append(event)
            self._go_on()

    async def run(self, join: Join, on_joined: Callable[[], None]) -> None:
        """Join the network, and stay until cancelled. A listener that can't be had is tried again."""
        while True:
            async with AsyncExitStack() as parts:
                try:
                    joined = await join(parts)
                except (StartError, OSError, ImportError) as error:
                    self._failure = str(error)
                    log.error("not joined, and tried again every %.0f s: %s", JOIN_AGAIN_S, error)
                else:
                    parts.push_async_callback(self._leave)
                    self._join(joined)
                    on_joined()
                    await asyncio.Event().wait()
            await asyncio.sleep(JOIN_AGAIN_S)

    @property
    def joined(self) -> Joined | None:
        """What the node has in its network; None before it has joined, and after it has left."""
        return self._joined

    def network_status(self) -> dict[str, object]:
        """What `hyperspace status` shows of the network."""
        if self._network is None or self.node.network is None:
            return {"state": self._failure or "joining"}
        return self._network.status(self.node.network)

    async def close(self) -> None:
        """Handle no event any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._prefixes is not None:
            await self._prefixes.close()

    # --- events in, effects out -----------------------------------------------------------------

    def _go_on(self) -> None:
        if self._handling or self._network is None:
            return
        self._handling = True
        try:
            while self._queue:
                self._handle(self._queue.popleft())
        finally:
            self._handling = False
        self._set_timer()

    def _handle(self, event: Event) -> None:
        if self._joined is None and isinstance(event, NetworkEvent) and not isinstance(event, _NEED_NO_NETWORK):
            if not self._has_left:
                self._early.add(event)
            return
        self.events += 1
        assert self._network is not None
        self._network.note(event)
        if self._prefixes is not None:
            self._prefixes.note(event)
        for effect in self.node.handle(event, clock.now()):
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        assert self._network is not None
        if isinstance(effect, ChargePeer) and effect.layer == "l1":
            self._network.charge(effect)
        elif not isinstance(effect, PrefixEffect | KvPeersChanged):
            self._network.perform(effect)
        elif self._prefixes is not None:
            self._prefixes.perform(effect)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        deadline_ms = self.node.next_deadline_ms()
        if deadline_ms is None:
            self._timer = None
        else:
            at_s = max(deadline_ms / 1000 + TICK_LATE_S, self._loop.time() + TICK_EVERY_S)
            self._timer = self._loop.call_at(at_s, self.submit, Tick())

    # --- the network ----------------------------------------------------------------------------

    def _join(self, joined: Joined) -> None:
        assert self._network is not None
        self._joined = joined
        self._network.join(joined)
        self.submit(joined.event)
        for event in self._early.take():
            self.submit(event)

    async def _leave(self) -> None:
        assert self._network is not None
        self._has_left = True
        self.submit(NetworkLeft())
        self._joined = None
        await self._network.leave()
