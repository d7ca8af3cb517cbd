"""The bulk transport between nodes: ZeroMQ with CURVE both ways, peers pinned by their identity.

Each connection has a socket that serves (chunk_server.py), each peer a socket that asks (peer_link.py). Configured
peers always have a link; the links of discovered peers come and go, and the KV_LINKS_MAX most recently useful ones are
open. Every wait has a deadline: a missing answer is `PeerFailed` with a reason. Chunk frames are passed on as received,
uncopied.
"""

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial

import zmq
from zmq.utils import z85

from ...config import Config
from ...core.events.known_peers import KvEndpoint
from ...core.peers.dials import Dials
from ...core.peers.standing import Delivered, Failed
from ...core.peers.trust import Trust
from ...core.records import wire
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import ManifestDigest, PeerId, RowId
from ...core.records.limits import KV_LINKS_MAX
from ...core.records.reason import Reason
from .. import clock
from ..identity import Identity, curve_public_of
from ..metrics import Metrics
from ..peer_failed import PeerFailed
from ..start_error import needed
from ..zmq_pump import Socket
from .chunk_server import ChunkServer
from .chunk_store import ChunkStore
from .peer_link import Chunks, PeerLink

log = logging.getLogger(__name__)


class ChunkTransport:
    """Serves this node's chunks and asks peers for theirs. Lives on one event loop.

    OSError when it can't listen; StartError when a configured peer is invalid.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        store: ChunkStore,
        metrics: Metrics,
        trust: Trust,
        dials: Dials,
        on_violation: Callable[[PeerId], None] = lambda peer: None,
    ) -> None:
        """`on_violation` is called with peers that break the protocol."""
        self._on_violation = on_violation
        self._identity = identity
        self._metrics = metrics
        self._trust = trust
        self._dials = dials
        self._configured = {each.peer: str(each.endpoint) for each in config.peer_addresses}
        self._discovered: dict[PeerId, KvEndpoint] = {}
        self._answered: dict[PeerId, str] = {}  # discovered peers that answered, and where
        self.charges: Counter[tuple[PeerId, Reason]] = Counter()
        self._context: zmq.Context[Socket] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._curve_keys: dict[PeerId, bytes] = {}
        self._links: dict[PeerId, PeerLink] = {}
        try:
            for peer, address in self._configured.items():
                with needed(f"peers: {peer}@{address}", "correct it, or take it out (HYPERSPACE_PEERS)"):
                    self._curve_keys[peer] = z85.decode(curve_public_of(peer))
                    self._links[peer] = self._connect(peer, address)
            self._server = ChunkServer(self._context, config.listen, identity, store, metrics, self.charge, trust.vouch)
        except BaseException:
            self._close_links()  # a context with an open socket can't be dropped: it would wait for ever
            raise
        self.admit(())
        metrics.peers.set(len(self._configured))

    @property
    def endpoint(self) -> str:
        """host:port at which peers reach this node."""
        return self._server.endpoint

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The peers that may be asked: the configured ones, then the discovered ones."""
        return (*self._configured, *self._discovered)

    def endpoint_of(self, peer: PeerId) -> str:
        """host:port at which the peer is reached; '' if unknown."""
        discovered = self._discovered.get(peer)
        return self._configured.get(peer) or (discovered.address if discovered else "")

    def set_peers(self, endpoints: Iterable[KvEndpoint]) -> None:
        """Set the discovered peers that may be asked from now on, and where; requests to others fail as `unreachable`.

        Configured peers stay as they are. A peer that was met at its own address, or has answered there, is dialled at
        once, others at the first request to them: a peer's claim about a third party must not make this node dial it.
        """
        self._discovered = {
            endpoint.peer: endpoint
            for endpoint in endpoints
            if endpoint.peer not in self._configured and endpoint.peer != self._identity.peer_id
        }
        for peer in [p for p, link in self._links.items() if self.endpoint_of(p) != link.address or link.over]:
            self._close_link(peer)
        self._answered = {p: at for p, at in self._answered.items() if self.endpoint_of(p) == at}
        for peer in self._discovered:
            if len(self._links) >= len(self._configured) + KV_LINKS_MAX:
                break
            if peer not in self._links and self._is_proved(peer):
                self._open(peer)
        self._metrics.peers.set(len(self.peers))

    def admit(self, peers: Iterable[PeerId]) -> None:
        """Serve only these and the configured peers from now on."""
        admitted = {*self._configured, *peers}
        self._curve_keys = {peer: self._curve_keys.get(peer) or _curve_key(peer) for peer in admitted}
        self._server.admit({key: peer for peer, key in self._curve_keys.items() if key})

    def is_connected(self, peer: PeerId) -> bool:
        """Whether a request would be sent at once."""
        link = self._links.get(peer)
        return link is not None and link.connected

    def charge(self, peer: PeerId, reason: Reason) -> None:
        """Charge a peer for something that the core has not seen."""
        self._trust.standings.note(Failed(peer, reason), clock.now())
        self.count_charge(peer, reason)

    def count_charge(self, peer: PeerId, reason: Reason) -> None:
        """A peer is charged."""
        self.charges[peer, reason] += 1
        self._metrics.failures_total.labels("l2", f"peer_{reason}").inc()
        if reason is Reason.PROTOCOL:
            self._on_violation(peer)

    def credit(self, peer: PeerId, size: int, took_ms: int) -> None:
        """A peer served so much of a row, and it verified."""
        self._trust.standings.note(Delivered(peer, size, took_ms), clock.now())

    async def find(self, peer: PeerId, row_ids: tuple[RowId, ...], timeout_s: float) -> wire.HaveReply:
        """Ask which of the rows the peer serves; the offers' indexes are within `row_ids`."""
        link = self._link(peer)
        reply = await link.ask(lambda n: wire.Have(n, row_ids), wire.HaveReply, timeout_s)
        assert isinstance(reply, wire.HaveReply)
        indexes = {offer.index for offer in reply.offers}
        if len(indexes) != len(reply.offers) or max(indexes, default=0) >= len(row_ids):
            raise link.violated("offers of rows that weren't asked for, or two of one")
        return reply

    async def manifest(self, peer: PeerId, digest: ManifestDigest, timeout_s: float) -> wire.ManifestReply:
        """An object's manifest, digest table and proof, all unchecked."""
        reply = await self._link(peer).ask(lambda n: wire.GetManifest(n, digest), wire.ManifestReply, timeout_s)
        assert isinstance(reply, wire.ManifestReply)
        return reply

    def chunks(
        self,
        peer: PeerId,
        digest: ManifestDigest,
        row: int,
        columns: tuple[int, ...],
        chunk_bytes: int,
        timeout_s: float,
    ) -> AsyncGenerator[Chunks, None]:
        """Unchecked (column, bytes), as many at a time as have arrived, each column once.

        `PeerFailed` at once if the peer can't be asked, and at the end if some never arrived. `timeout_s` is for all of
        them. Close the iterator to cancel.
        """
        return self._link(peer).chunks(digest, row, columns, chunk_bytes, timeout_s)

    async def close(self) -> None:
        """End everything at once."""
        await self._server.close()
        self._close_links()

    def _close_links(self) -> None:
        for link in self._links.values():
            link.close()
        self._context.destroy(linger=0)

    def _link(self, peer: PeerId) -> PeerLink:
        """The peer's link, opened if need be in place of one without requests."""
        if peer in self._links and self._links[peer].over:
            self._close_link(peer)
        if peer in self._discovered and peer not in self._links:
            if len(self._links) >= len(self._configured) + KV_LINKS_MAX:
                self._drop_link()
            self._open(peer)
        link = self._links.get(peer)
        if link is None:
            raise PeerFailed(Reason.UNREACHABLE)
        return link

    def _drop_link(self) -> None:
        idle = {p: link for p, link in self._links.items() if p in self._discovered and not link.busy}
        if not idle:
            raise PeerFailed(Reason.BUSY)
        peer = min(idle, key=lambda p: idle[p].useful_at)
        self._close_link(peer)

    def _close_link(self, peer: PeerId) -> None:
        link = self._links.pop(peer)
        if link.has_answered:
            self._answered[peer] = link.address
        link.close()

    def _open(self, peer: PeerId) -> None:
        """Connect to a discovered peer; a peer whose record is unusable gets no link."""
        try:
            self._links[peer] = self._connect(peer, self._discovered[peer].address)
        except ValueError as error:
            log.info("peer %s can't be reached at %s: %s", peer, self._discovered[peer].address, error)

    def _connect(self, peer: PeerId, address: str) -> PeerLink:
        return PeerLink(self._context, peer, address, self._identity, self.charge, partial(self._may_dial, peer))

    def _may_dial(self, peer: PeerId) -> bool:
        """Whether a link may be dialled (again) now."""
        if peer in self._configured:
            return True
        return self._dials.take(peer, self.endpoint_of(peer), self._is_proved(peer), clock.now())

    def _is_proved(self, peer: PeerId) -> bool:
        """Whether a discovered peer's endpoint is its own: it was met at that host, or has answered there."""
        endpoint, link = self._discovered.get(peer), self._links.get(peer)
        if endpoint is None:
            return False
        answered_at = link.address if link is not None and link.has_answered else self._answered.get(peer)
        return endpoint.own or answered_at == endpoint.address


def _curve_key(peer: PeerId) -> bytes:
    """The peer's CURVE key; empty if its id names no usable key."""
    try:
        return z85.decode(curve_public_of(peer))
    except ProtocolViolation:
        return b""
