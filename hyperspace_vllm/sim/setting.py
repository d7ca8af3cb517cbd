"""The shared parts of a simulation: one clock, one trace, and the network, gossip and DHT under all hosts."""

from dataclasses import dataclass, field

from nacl.signing import SigningKey

from ..core.records.ids import NetworkId, RequestKey
from .agenda import Agenda
from .sim_dht import Dht
from .sim_gossip import Gossip
from .sim_network import SimNetwork
from .trace import Trace

EPOCH_MS = 1_700_000_000_000


@dataclass(frozen=True)
class Setting:
    """The parts of one simulation that exist before its hosts do. `is_open`: without a network key."""

    seed: int
    network_id: NetworkId
    is_open: bool
    departed: SigningKey  # of a member that has left: it is listed, and its signed responses are still served
    agenda: Agenda
    trace: Trace
    network: SimNetwork
    gossip: Gossip
    dht: Dht
    keys: dict[bytes, RequestKey] = field(default_factory=dict)  # by request hash, of all responses ever asked for

    @property
    def wall_ms(self) -> int:
        """The time of day, which hosts' clocks show more or less."""
        return EPOCH_MS + self.agenda.now_ms
