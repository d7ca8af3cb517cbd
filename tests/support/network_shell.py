"""The network's shell of one node, without KV: its core, its driver, and what performs its network effects."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nacl.signing import SigningKey

from hyperspace_vllm.core.node.node import Node
from hyperspace_vllm.core.node.node_options import NodeOptions
from hyperspace_vllm.core.peers.dials import Dials
from hyperspace_vllm.core.peers.trust import Trust
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.driver import Driver
from hyperspace_vllm.daemon.node.network_effects import NetworkEffects
from hyperspace_vllm.daemon.node.network_responses import NetworkResponses
from hyperspace_vllm.daemon.node.peer_events import PeerEvents
from hyperspace_vllm.daemon.responses.fetched_response import Stored
from hyperspace_vllm.daemon.responses.response_lookups import Clients


class NetworkShell:
    """As main.py builds it; `make` makes another core."""

    def __init__(
        self,
        options: NodeOptions,
        key: SigningKey,
        trust: Trust,
        clients: Clients,
        store: Stored | None,
        metrics: Metrics,
        share: Any = "network",
        listens: bool = True,
        make: Callable[..., Node] = Node,
        shared: Any = None,
    ) -> None:
        options = replace(options, joins=listens, shares=share != "private")
        self.node = make(options, key, trust, Dials(clock.now()), random.Random(1))
        self.driver = Driver(self.node)
        scope: Any = "public" if share == "public" else "network"
        effects = NetworkEffects(options.network, trust, clients, store, scope, metrics, self.driver.submit, shared)
        self.events = PeerEvents(self.node, trust, effects.requests, self.driver.submit)
        self.lookups = effects.lookups
        self.responses = NetworkResponses(self.driver, effects.lookups, trust, share, shared)
        self.driver.begin(effects, None)
