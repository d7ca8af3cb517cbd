"""The one driver: which performer gets an effect, in which order events are handled, and when time is told."""

import asyncio
from collections.abc import Callable
from typing import cast

from hyperspace_vllm.core.events.conduct import ChargePeer
from hyperspace_vllm.core.events.gossip import Publish
from hyperspace_vllm.core.events.known_peers import KvPeersChanged
from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.prefix_reading import EndLookup, PrefixReleased
from hyperspace_vllm.core.events.vocabulary import Effect, Event
from hyperspace_vllm.core.node.node import Node
from hyperspace_vllm.core.records.ids import PeerId
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.node.driver import Driver
from hyperspace_vllm.daemon.node.network_effects import NetworkEffects

PEER = PeerId("a peer")
OF_NETWORK: list[Effect] = [Publish("topic", b""), ChargePeer(PEER, Reason.PROTOCOL, "l1")]
OF_PREFIXES: list[Effect] = [EndLookup(1), KvPeersChanged((), ()), ChargePeer(PEER, Reason.PROTOCOL, "l2")]


class Core:
    """A core that answers every event with the same effects."""

    def __init__(self, effects: list[Effect]) -> None:
        self.effects = effects
        self.told: list[Event] = []
        self.due_ms: int | None = None
        self.has_ticked = asyncio.Event()

    def handle(self, event: Event, now: Now) -> list[Effect]:
        self.told.append(event)
        if isinstance(event, Tick):
            self.due_ms = None
            self.has_ticked.set()
        return self.effects

    def next_deadline_ms(self) -> int | None:
        return self.due_ms


class Performer:
    """Notes what it is to do, and what the core is told before."""

    def __init__(self) -> None:
        self.done: list[Effect] = []
        self.noted: list[Event] = []
        self.on_effect: Callable[[], None] = lambda: None

    def note(self, event: Event) -> None:
        self.noted.append(event)

    def perform(self, effect: Effect) -> None:
        self.done.append(effect)
        self.on_effect()

    def charge(self, effect: ChargePeer) -> None:
        self.done.append(effect)

    async def close(self) -> None: ...


def started(effects: list[Effect]) -> tuple[Driver, Core, Performer, Performer]:
    core, network, prefixes = Core(effects), Performer(), Performer()
    driver = Driver(cast(Node, core))
    driver.begin(cast(NetworkEffects, network), prefixes)
    return driver, core, network, prefixes


async def test_an_effect_goes_to_the_performer_of_its_domain_in_order() -> None:
    driver, _, network, prefixes = started([*OF_NETWORK, *OF_PREFIXES])
    driver.submit(PrefixReleased(1))
    assert network.done == OF_NETWORK
    assert prefixes.done == OF_PREFIXES
    assert network.noted == prefixes.noted == [PrefixReleased(1)]


async def test_what_comes_of_an_effect_is_handled_after_the_effects_beside_it() -> None:
    driver, core, network, _ = started([Publish("topic", b"1"), Publish("topic", b"2")])
    handled: list[int] = []

    def submit_once() -> None:
        if not handled:
            driver.submit(PrefixReleased(2))
        handled.append(len(core.told))

    network.on_effect = submit_once
    driver.submit(PrefixReleased(1))
    assert handled == [1, 1, 2, 2]
    assert core.told == [PrefixReleased(1), PrefixReleased(2)]


async def test_what_happens_before_the_performers_are_there_waits_for_them() -> None:
    core, network = Core([]), Performer()
    driver = Driver(cast(Node, core))
    driver.submit(PrefixReleased(1))
    assert core.told == []
    driver.begin(cast(NetworkEffects, network), None)
    assert core.told == [PrefixReleased(1)]


async def test_the_core_is_told_of_its_deadline_once_it_has_come_and_of_none_after_the_end() -> None:
    driver, core, _, _ = started([])
    core.due_ms = clock.now().mono_ms + 20
    driver.submit(PrefixReleased(1))
    due_ms = core.due_ms
    await asyncio.wait_for(core.has_ticked.wait(), 60)
    assert clock.now().mono_ms >= due_ms
    core.due_ms = clock.now().mono_ms - 1_000  # long past: at once, but not before the loop has turned
    driver.submit(PrefixReleased(2))
    assert core.told == [PrefixReleased(1), Tick(), PrefixReleased(2)]
    await driver.close()
    driver.submit(PrefixReleased(3))
    await asyncio.sleep(0.01)
    assert core.told == [PrefixReleased(1), Tick(), PrefixReleased(2)]
