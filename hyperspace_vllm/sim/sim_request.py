"""A client's request in a simulation, with its result."""

from dataclasses import dataclass, field

from ..core.records.ids import PeerId, RequestKey
from ..core.response.sealed_hit import Opened


@dataclass(slots=True, eq=False)
class Request:
    """A client's request that its node had no answer to. Times are virtual, -1: not yet."""

    host: int
    lookup: int
    key: RequestKey
    request_hash: bytes
    asked_ms: int
    providers: tuple[int, ...]  # honest hosts that had it then, and could be reached
    promised: tuple[int, ...]  # those of them whose announcement had time to spread
    source: bytes  # of the client, as audits name it
    hinted: bool | None = None
    answered_ms: int = -1
    reason: str = ""
    hit: bool = False
    waiting: bool = True  # for the network: the engine hasn't won
    life: int = 0  # the host's
    asked: list[int] = field(default_factory=list)  # hosts, -1 for ones that don't exist
    far: set[int] = field(default_factory=set)  # those of them that could not answer in time when they were asked
    lapsed: set[int] = field(default_factory=set)  # those of them whose copy had expired by the requester's clock
    hindered: bool = False  # by those that were asked first
    fetched: dict[PeerId, Opened] = field(default_factory=dict)  # what it sent
