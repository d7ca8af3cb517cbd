"""The vocabulary of a node: every event that `Node.handle` takes, and every effect that it returns.

The daemon performs effects with real sockets, files and threads, the simulator against a virtual clock.
"""

from .conduct import AnswerAudited, ChargePeer, PeerMisbehaved
from .connections import Connect, ConnectFailed, Disconnect, PeerConnected, PeerDisconnected, PeerDiscovered
from .dht import NotProvided, Provide, ProvidersFound, SearchDht
from .gossip import AuthorsChanged, GossipReceived, GossipSpoiled, Publish
from .known_peers import KvPeersChanged, PeersChanged
from .node_state import NetworkJoined, NetworkLeft, ServedChanged, Tick
from .owner_documents import DeltasImported, DeltasRefused, ForgetOwner, ImportDeltas, OwnDeltaWritten, WriteRegistry
from .peer_requests import Answered, Reply, RequestFailed, RequestReceived, Send, ServeResponse
from .prefix_reading import (
    AnswerPrefix,
    ChunksVerified,
    EndLookup,
    FetchManifest,
    FetchRow,
    FindRowHolders,
    FindRows,
    HolderStalled,
    LoadRow,
    ManifestRefused,
    ManifestVerified,
    PrefixReleased,
    PrefixWanted,
    ProviderAnswered,
    ProviderFailed,
    ReleaseRows,
    RowFailed,
    RowReady,
    RowsFound,
)
from .prefix_writing import (
    ClientGone,
    DropStaged,
    EncodeObject,
    KeepRow,
    ObjectEncoded,
    ObjectFailed,
    RequestOver,
    RowArrived,
    RowsStored,
    SegmentKeyKnown,
    UnpinRows,
)
from .response_reading import (
    AnswerResponse,
    FetchResponse,
    HintResponse,
    ReadShared,
    ResponseFetched,
    ResponseRefused,
    ResponseReleased,
    ResponseWanted,
    SharedRead,
)
from .stored_responses import ResponsesGone, ResponseStored, ResponsesUsed

PrefixEvent = (
    PrefixWanted
    | PrefixReleased
    | RowsFound
    | ProviderAnswered
    | ProviderFailed
    | ManifestVerified
    | ManifestRefused
    | ChunksVerified
    | HolderStalled
    | RowReady
    | RowFailed
    | RowArrived
    | SegmentKeyKnown
    | RequestOver
    | ClientGone
    | ObjectEncoded
    | ObjectFailed
)
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
    | SharedRead
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
)
Event = PrefixEvent | NetworkEvent | NetworkJoined | NetworkLeft | Tick

PrefixEffect = (
    FindRows
    | LoadRow
    | ReleaseRows
    | FindRowHolders
    | FetchManifest
    | FetchRow
    | EndLookup
    | AnswerPrefix
    | KeepRow
    | UnpinRows
    | DropStaged
    | EncodeObject
    | ChargePeer
)
NetworkEffect = (
    Connect
    | Disconnect
    | Send
    | Reply
    | ServeResponse
    | Publish
    | PeersChanged
    | KvPeersChanged
    | AuthorsChanged
    | HintResponse
    | ReadShared
    | FetchResponse
    | SearchDht
    | AnswerResponse
    | Provide
    | WriteRegistry
    | ImportDeltas
    | ForgetOwner
    | ChargePeer
)
Effect = PrefixEffect | NetworkEffect
