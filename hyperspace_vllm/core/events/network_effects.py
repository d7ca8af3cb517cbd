"""What a node's network core wants done: everything that `NetworkNode.handle` returns.

The daemon performs effects with libp2p, loro and SQLite, the simulator against a virtual clock. Each docstring names
the events that answer it. An effect without answer is done as well as possible, and nobody hears how it went.
"""

from dataclasses import dataclass

from ..records.ids import PeerId
from ..records.peer_record import PeerRecord
from ..records.peer_wire import PeerAnswer, PeerRequest
from ..records.rank import Acquaintance
from ..records.reason import Reason

# --- connections --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a connection to `peer` at `address` (host:port). PeerConnected or ConnectFailed."""

    peer: PeerId
    address: str
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close every connection to `peer`. PeerDisconnected, if there was one."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Send:
    """Ask `peer` something, on the stream of `protocol_of(message)`. Answered or RequestFailed."""

    request: int
    peer: PeerId
    message: PeerRequest
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer RequestReceived."""

    token: int
    message: PeerAnswer


@dataclass(frozen=True, slots=True)
class ServeResponse:
    """Answer RequestReceived(Query) with Hit, sealed, if the response is here and may leave this node; else Miss."""

    token: int
    request_hash: bytes
    popularity: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Send `payload` to everybody who has subscribed to `topic`."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class KvEndpoint:
    """Where a peer says that it serves KV (host:port). `own`: it was met at that host; otherwise a dial has to show."""

    peer: PeerId
    address: str
    own: bool


@dataclass(frozen=True, slots=True)
class PeersChanged:
    """The peers that this node knows and may use (alive as far as it knows, trusted or not), for L2 and status.

    `endpoints` are those of them that may be dialled for KV.
    """

    usable: tuple[PeerRecord, ...]
    endpoints: tuple[KvEndpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class AuthorsChanged:
    """Whose gossip is delivered and passed on from now on (gossip_gate.py)."""

    authors: tuple[tuple[PeerId, Acquaintance], ...]


@dataclass(frozen=True, slots=True)
class ChargePeer:
    """A peer broke the protocol or lied: for metrics and the log."""

    peer: PeerId
    reason: Reason


# --- L1 -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HintResponse:
    """Tell the client at once whether there is a hint: then it waits for AnswerResponse, else it races the engine."""

    lookup: int
    hinted: bool


@dataclass(frozen=True, slots=True)
class FetchResponse:
    """Connect if need be, query, open and verify. ResponseFetched or ResponseRefused.

    `address` is where to dial a peer that isn't connected; '' when its address isn't known.
    """

    lookup: int
    peer: PeerId
    address: str
    request_hash: bytes
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class FindProviders:
    """Search the DHT for /cache/<request hash>. ProvidersFound."""

    lookup: int
    request_hash: bytes
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class AnswerResponse:
    """The lookup is over. `peer` None: a miss. Otherwise what that peer's fetch brought is the answer: store it too.

    Cancels what still runs for the lookup. Not answered, but what is stored is reported by ResponseStored.
    """

    lookup: int
    peer: PeerId | None
    source: str  # gossip+registry | dht | none
    reason: str  # hit | not_found | deadline | no_peers | refused reasons …; a metric label


@dataclass(frozen=True, slots=True)
class Provide:
    """Add this node to a key's providers in the DHT: '/cache/<hex>' or '/kv-prefix/<model in hex>/<hex>'.

    NotProvided where that fails.
    """

    key: str


# --- registry -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WriteRegistry:
    """Change this node's own document: add (id, expires at), remove ids. OwnDeltaWritten.

    `compact`: begin a new epoch with a shallow snapshot that holds just the entries after this change.
    """

    added: tuple[tuple[bytes, int], ...]
    removed: tuple[bytes, ...]
    compact: bool


@dataclass(frozen=True, slots=True)
class ImportDeltas:
    """Import checked deltas of one owner, in order. DeltasImported or DeltasRefused."""

    owner: bytes
    epoch: int
    payloads: tuple[bytes, ...]
    starts_with_snapshot: bool
    sequence: int  # of the last one


@dataclass(frozen=True, slots=True)
class ForgetOwner:
    """Drop an owner's document: it expired, misbehaved, or made room for others."""

    owner: bytes


NetworkEffect = (
    Connect
    | Disconnect
    | Send
    | Reply
    | ServeResponse
    | Publish
    | PeersChanged
    | AuthorsChanged
    | ChargePeer
    | HintResponse
    | FetchResponse
    | FindProviders
    | AnswerResponse
    | Provide
    | WriteRegistry
    | ImportDeltas
    | ForgetOwner
)
