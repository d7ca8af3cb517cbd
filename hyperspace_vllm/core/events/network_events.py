"""What happens to a node's network core: everything that `NetworkNode.handle` takes.

Response bodies never appear here; the core sees request hashes (ids), sizes and verdicts. RequestKeys stay in the shell
that knows a lookup's number. Every effect that starts work is answered by exactly one of the events named in its
docstring (network_effects.py), unless it was cancelled.
"""

from dataclasses import dataclass, field

from ..records.announcement import EvidenceEntry
from ..records.ids import PeerId
from ..records.peer_wire import PeerAnswer, PeerRequest
from ..records.reason import Reason
from ..records.registry_delta import RegistryDelta

# --- connections --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A libp2p connection to `peer` is open; Noise has proved its identity (and the network key, if there is one).

    `host` is the IP address at the other end, '' where the shell doesn't know it.
    """

    peer: PeerId
    host: str = ""


@dataclass(frozen=True, slots=True)
class PeerDiscovered:
    """A machine of this local network says that `peer` is at host:port (mDNS); nothing of it is proved.

    `told_from` is an IP address that reaches as far as the machine's.
    """

    peer: PeerId
    address: str
    told_from: str


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection to `peer` has closed."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """Answers Connect, which is otherwise answered by PeerConnected."""

    peer: PeerId
    reason: Reason  # timeout | unreachable


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """`peer` asks something; answer with Reply or ServeResponse under this `token`."""

    token: int
    peer: PeerId
    message: PeerRequest


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers Send: what `peer` said, decoded and within bounds, nothing in it believed yet."""

    request: int
    peer: PeerId
    message: PeerAnswer


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """Answers Send: nothing (good) came."""

    request: int
    peer: PeerId
    reason: Reason  # timeout | unreachable | protocol | busy


@dataclass(frozen=True, slots=True)
class GossipReceived:
    """A message on one of the two topics; `relay` is the neighbour that it came through, not its author."""

    topic: str
    relay: PeerId
    payload: bytes


@dataclass(frozen=True, slots=True)
class GossipSpoiled:
    """A neighbour passed on more invalid messages than any honest one does; it is not listened to."""

    relay: PeerId


# --- L1 -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResponseWanted:
    """A request that this node could not answer. `lookup` is unique in this node's life."""

    lookup: int
    request_hash: bytes
    deadline_ms: int  # a duration
    told: tuple[PeerId, ...] = ()  # providers that the shell knows of by itself (a Redis registry)


@dataclass(frozen=True, slots=True)
class ResponseReleased:
    """Nobody waits for the lookup any more. What it fetches on may still be stored."""

    lookup: int


@dataclass(frozen=True, slots=True)
class ResponseFetched:
    """Answers FetchResponse: opened, and its CacheProof verified."""

    lookup: int
    peer: PeerId
    size: int
    expires_at_ms: int
    popularity: int  # as the provider claims, in 1/16 requests


@dataclass(frozen=True, slots=True)
class ResponseRefused:
    """Answers FetchResponse: there is no answer, or one that doesn't hold."""

    lookup: int
    peer: PeerId
    reason: Reason


@dataclass(frozen=True, slots=True)
class NotProvided:
    """Answers a Provide that failed: no peer stored the record in time."""

    key: str


@dataclass(frozen=True, slots=True)
class ProvidersFound:
    """Answers FindProviders; hints, none of them believed. `cost_ms` is the CPU time that the search took."""

    lookup: int
    peers: tuple[PeerId, ...]
    cost_ms: float


@dataclass(frozen=True, slots=True)
class ResponseStored:
    """This node can serve a response now. `computed`: by its own engine; False: fetched from a peer."""

    request_hash: bytes
    expires_at_ms: int
    computed: bool


@dataclass(frozen=True, slots=True)
class ResponsesGone:
    """Evicted or expired: this node can't serve them any more."""

    request_hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ResponsesUsed:
    """Hits of this node's own clients."""

    request_hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AnswerAudited:
    """This node's own audit of another node's answer: in `evidence`, how many tokens its model doesn't choose.

    `source` is what the client that asked for the answer can't be twice.
    """

    evidence: EvidenceEntry
    source: bytes


# --- L2 -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowsStored:
    """This node can serve an object's rows now; they may leave it."""

    manifest: bytes
    fingerprint: bytes
    commitment: bytes
    row_ids: tuple[bytes, ...]
    expires_at_ms: int


# --- L3 -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServedChanged:
    """What the engines of this host serve now, all of it, for this node's PeerRecord (the fields are the record's)."""

    models: tuple[bytes, ...]
    fingerprints: tuple[bytes, ...]
    load_permille: int
    vram_digest: bytes


# --- registry -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OwnDeltaWritten:
    """Answers WriteRegistry: signed, and already part of this node's own document."""

    delta: RegistryDelta
    raw: bytes


@dataclass(frozen=True, slots=True)
class DeltasImported:
    """Answers ImportDeltas: the owner's document has it all; its entries (id, expires at) now, and what went."""

    owner: bytes
    epoch: int
    sequence: int
    added: tuple[tuple[bytes, int], ...]
    removed: tuple[bytes, ...]
    cleared: bool  # a snapshot: `added` is everything there is
    took_ms: int = field(default=0, compare=False)  # of the worker's CPU time


@dataclass(frozen=True, slots=True)
class DeltasRefused:
    """Answers ImportDeltas: the owner wrote what isn't a document, or what the worker didn't survive (`lost`).

    `worker` says nothing of the owner: the document that the deltas continue isn't there, or no worker is.
    """

    owner: bytes
    reason: str  # malformed | too_large | lost | worker
    took_ms: int = field(default=0, compare=False)  # of the worker's CPU time


@dataclass(frozen=True, slots=True)
class PeerMisbehaved:
    """A peer sent what the protocol forbids; which words, its reader has said."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class NetworkTick:
    """Nothing but time has passed."""


NetworkEvent = (
    PeerConnected
    | PeerDiscovered
    | PeerDisconnected
    | ConnectFailed
    | RequestReceived
    | Answered
    | RequestFailed
    | GossipReceived
    | GossipSpoiled
    | ResponseWanted
    | ResponseReleased
    | ResponseFetched
    | ResponseRefused
    | NotProvided
    | ProvidersFound
    | ResponseStored
    | ResponsesGone
    | ResponsesUsed
    | AnswerAudited
    | RowsStored
    | ServedChanged
    | OwnDeltaWritten
    | DeltasImported
    | DeltasRefused
    | PeerMisbehaved
    | NetworkTick
)
