"""The DHT for py-libp2p: provider records only, bounded, and found without a search of the whole network first.

The library's own asks the 20 closest peers for closer ones before it asks the first for providers, remembers what it
found for two days, accepts any number of keys and 50,000 values of a mebibyte each, and believes any peer's claim that
another peer exists.
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import trio
from libp2p.abc import IHost, INetStream
from libp2p.kad_dht.common import BUCKET_SIZE, PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.routing_table import RoutingTable
from libp2p.kad_dht.utils import sort_peer_ids_by_distance
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.envelope import consume_envelope
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from ...core.records.ids import PeerId
from ...core.records.limits import KiB
from ...core.records.rank import Tier
from .libp2p_room import Hold, PeerRoom
from .libp2p_swarm import ADDRESSES_PER_PEER_MAX, PEER_ENVELOPE_BYTES_MAX, PEER_ID_BYTES_MAX

QUERY_S = 1.5  # a frozen peer costs a lookup this much, once
PROVIDER_TTL_S = 15 * 60  # three missed renewals
PROVIDER_RENEWAL_S = 5 * 60
MAINTENANCE_S = 60.0
DHT_MESSAGE_BYTES_MAX = 64 * KiB  # 20 peers of about 500 B, and as many providers
DHT_FIELDS_MAX = 1_000  # of 40 peers with 12 fields each, twice
DHT_STREAMS_MAX = 256
DHT_STREAMS_PER_PEER_MAX = 32
DHT_STREAMS_OF_STRANGERS_MAX = 128
DHT_STREAM_S = 10.0
DHT_IDLE_S = 2.0  # from the end of one message to the end of the next
PROVIDER_MESSAGES_PER_10_S = 2_000  # from one peer; what they may add is bounded below
PROVIDERS_MAX = 50_000
PROVIDERS_PER_PEER_MAX = 4_000
PROVIDED_MAX = 1_000  # keys that this node renews: the newest
REPLICAS = 8  # peers that hold a provider record
DHT_ASKED_MAX = 16
DHT_DIALS_MAX = 4  # per lookup, to peers that others claim exist
DHT_PARALLEL = 4


_Answer = tuple[list[Message.Peer], bool]  # closer peers, as claimed; whether that is enough
# Connect to a peer at one of these addresses, which came from that IP address; returns whether it did.
Dial = Callable[[ID, list[Multiaddr], str], Awaitable[bool]]

logger = logging.getLogger(__name__)


class _ConnectedOnly(RoutingTable):
    """Holds connected peers only: another peer's claim doesn't prove that a peer exists."""

    async def add_peer(self, peer_obj: PeerInfo | ID, *, skip_server_mode_check: bool = False) -> bool:
        """Add a connected peer."""
        peer_id = peer_obj.peer_id if isinstance(peer_obj, PeerInfo) else peer_obj
        network: Any = self.host.get_network()
        if not network.live(peer_id):
            return False
        try:
            addresses = self.host.get_peerstore().addrs(peer_id)
        except KeyError:
            addresses = []
        return await super().add_peer(PeerInfo(peer_id, addresses), skip_server_mode_check=skip_server_mode_check)


class _NoValues(ValueStore):
    """Stores no value records: they have no use here, and a peer could store 50,000 of a mebibyte each."""

    def put_record(self, key: bytes, record: Any) -> None:
        """Refuse."""
        raise ValueError("no value records here")


class NodeProviders(ProviderStore):
    """Provider records: bounded in all and per peer, found without a search of the whole network first.

    The library's own asks the 20 closest peers for closer ones before it asks the first for providers, remembers what
    it found for two days, and keeps any number of keys.
    """

    def __init__(self, host: IHost, routing: Any, table: RoutingTable, dial: Dial) -> None:
        super().__init__(host, routing)
        self._table = table
        self._dial = dial
        self._keys_of: dict[ID, OrderedDict[bytes, None]] = {}
        self._info_of: dict[ID, PeerInfo] = {}
        self._count = 0
        self._provided: OrderedDict[bytes, float] = OrderedDict()

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Remember that a peer provides a key; its own oldest record makes room, or one of the peer with the most."""
        peer_id = provider.peer_id
        keys = self._keys_of.setdefault(peer_id, OrderedDict())
        known = self.providers.get(key, {})
        if str(peer_id) not in known and len(known) >= BUCKET_SIZE:
            if not keys:
                del self._keys_of[peer_id]
            return
        if key in keys:
            keys.move_to_end(key)
        else:
            if len(keys) >= PROVIDERS_PER_PEER_MAX:
                self._forget(peer_id, next(iter(keys)))
            elif self._count >= PROVIDERS_MAX:
                greediest = max(self._keys_of, key=lambda peer: len(self._keys_of[peer]))
                self._forget(greediest, next(iter(self._keys_of[greediest])))
            self._keys_of.setdefault(peer_id, keys)[key] = None
            self._count += 1
        # One list of addresses per peer, not per key.
        store: Any = self.host.get_peerstore()
        addresses = store.may_pass_on(peer_id, provider.addrs[:ADDRESSES_PER_PEER_MAX])
        self._info_of[peer_id] = PeerInfo(peer_id, addresses)
        super().add_provider(key, self._info_of[peer_id])

    def _forget(self, peer_id: ID, key: bytes) -> None:
        records = self.providers.get(key)
        if records is not None:
            records.pop(str(peer_id), None)
            if not records:
                del self.providers[key]
        keys = self._keys_of.get(peer_id)
        if keys is not None and key in keys:
            del keys[key]
            self._count -= 1
            if not keys:
                del self._keys_of[peer_id]
                self._info_of.pop(peer_id, None)

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        """The peers known to provide a key whose records have not expired."""
        records = self.providers.get(key, {})
        for record in [record for record in records.values() if record.is_expired()]:
            self._forget(record.peer_id, key)
        return [PeerInfo(record.peer_id, record.addresses) for record in records.values()]

    def cleanup_expired(self) -> None:
        """Remove records older than PROVIDER_TTL_S."""
        for key, records in list(self.providers.items()):
            for record in [record for record in records.values() if record.is_expired()]:
                self._forget(record.peer_id, key)

    async def provide(self, key: bytes) -> bool:
        """Tell the closest peers, now and every PROVIDER_RENEWAL_S, until PROVIDED_MAX newer keys were provided."""
        self._provided[key] = time.monotonic()
        self._provided.move_to_end(key)
        while len(self._provided) > PROVIDED_MAX:
            self._provided.popitem(last=False)
        self.add_provider(key, PeerInfo(self.local_peer_id, self.host.get_addrs()))
        near = self._table.find_local_closest_peers(key, BUCKET_SIZE)
        if self._table.size() > BUCKET_SIZE:  # else this node knows every peer that it could find
            near = await self._walk(key, near, self._ask_closer(key))
        return await self._tell({peer_id: [key] for peer_id in near[:REPLICAS]}) > 0

    async def renew(self) -> None:
        """Provide again what is due: one stream per peer, however many keys."""
        now = time.monotonic()
        keys_for: dict[ID, list[bytes]] = {}
        for key in [key for key, at in self._provided.items() if now - at >= PROVIDER_RENEWAL_S]:
            self._provided[key] = now
            self.add_provider(key, PeerInfo(self.local_peer_id, self.host.get_addrs()))
            for peer_id in self._table.find_local_closest_peers(key, REPLICAS):
                keys_for.setdefault(peer_id, []).append(key)
        await self._tell(keys_for)

    async def find_providers(self, key: bytes, count: int = 20) -> list[PeerInfo]:
        """The providers of a key: known ones first, then asks from the closest peers outwards until it has `count`."""
        found = {info.peer_id: info for info in self.get_providers(key) if info.peer_id != self.local_peer_id}

        async def ask(peer_id: ID) -> _Answer:
            answer = await self._query(peer_id, Message(type=Message.MessageType.GET_PROVIDERS, key=key))
            for provider in answer.providerPeers[:BUCKET_SIZE]:
                found_id = ID(provider.id)
                if found_id != self.local_peer_id and len(provider.id) <= PEER_ID_BYTES_MAX:
                    found.setdefault(found_id, PeerInfo(found_id, []))
            return _closer_peers(answer), len(found) >= count

        if len(found) < count:
            await self._walk(key, self._table.find_local_closest_peers(key, BUCKET_SIZE), ask)
        return list(found.values())[:count]

    def _ask_closer(self, key: bytes) -> Callable[[ID], Awaitable[_Answer]]:
        async def ask(peer_id: ID) -> _Answer:
            answer = await self._query(peer_id, Message(type=Message.MessageType.FIND_NODE, key=key))
            return _closer_peers(answer), False

        return ask

    async def _query(self, peer_id: ID, question: Message) -> Message:
        # Without the signed addresses that the library sends and checks with each message: identify has exchanged them.
        stream = await self.host.new_stream(peer_id, [PROTOCOL_ID])
        try:
            await stream.write(encode_varint_prefixed(question.SerializeToString()))
            answer = Message()
            answer.ParseFromString(await read_varint_prefixed_bytes_limited(stream, DHT_MESSAGE_BYTES_MAX))
            return answer
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()

    async def _tell(self, keys_for: dict[ID, list[bytes]]) -> int:
        # The echoes are not read: they only confirm that the message arrived, even if it was dropped.
        provider = Message.Peer(
            id=self.local_peer_id.to_bytes(), addrs=[address.to_bytes() for address in self.host.get_addrs()]
        )
        told = 0
        limiter = trio.CapacityLimiter(DHT_PARALLEL)

        async def tell(peer_id: ID, keys: list[bytes]) -> None:
            nonlocal told
            with suppress(Exception):
                async with limiter:
                    with trio.fail_after(QUERY_S):
                        stream = await self.host.new_stream(peer_id, [PROTOCOL_ID])
                        kind = Message.MessageType.ADD_PROVIDER
                        for key in keys:
                            message = Message(type=kind, key=key, providerPeers=[provider])
                            await stream.write(encode_varint_prefixed(message.SerializeToString()))
                        await stream.close()
                        told += 1

        async with trio.open_nursery() as nursery:
            for peer_id, keys in keys_for.items():
                nursery.start_soon(tell, peer_id, keys)
        return told

    async def _walk(self, key: bytes, near: list[ID], ask: Callable[[ID], Awaitable[_Answer]]) -> list[ID]:
        # Returns the closest peers found: asks from the closest outwards, DHT_PARALLEL at a time, and continues with
        # the peers that the answers name.
        network: Any = self.host.get_network()
        asked: set[ID] = set()
        told: dict[ID, _Told] = {}
        dials = 0
        answers_in, answers_out = trio.open_memory_channel[tuple[dict[ID, _Told], bool]](DHT_ASKED_MAX)

        async def one(peer_id: ID) -> None:
            closer, done = dict[ID, _Told](), False
            with suppress(Exception), trio.move_on_after(QUERY_S):
                if network.live(peer_id) or await self._dial(peer_id, *told[peer_id]):
                    told_from = network.host_of(peer_id)  # before it can disconnect
                    said, done = await ask(peer_id)
                    closer = {ID(peer.id): _Told(_addresses(peer), told_from) for peer in said}
            answers_in.send_nowait((closer, done))

        async with trio.open_nursery() as nursery:
            running_now = 0
            while True:
                for peer_id in near:
                    if running_now >= DHT_PARALLEL or len(asked) >= DHT_ASKED_MAX:
                        break
                    if peer_id in asked or peer_id == self.local_peer_id:
                        continue
                    if not network.live(peer_id):
                        # Only at addresses that the peer itself has signed, and within the core's dial budget.
                        if dials >= DHT_DIALS_MAX or peer_id not in told or not told[peer_id].addresses:
                            continue
                        dials += 1
                    asked.add(peer_id)
                    running_now += 1
                    nursery.start_soon(one, peer_id)
                if running_now == 0:
                    return near
                closer, done = await answers_out.receive()
                running_now -= 1
                if done:
                    nursery.cancel_scope.cancel()
                    return near
                fresh = [peer_id for peer_id in closer if peer_id not in near]
                told |= {peer_id: closer[peer_id] for peer_id in fresh if len(told) < 2 * DHT_ASKED_MAX * BUCKET_SIZE}
                if fresh:
                    near = sort_peer_ids_by_distance(key, [*near, *fresh])[:BUCKET_SIZE]


class _Told(NamedTuple):
    """The addresses that a peer claims, and the IP address that sent the answer with them."""

    addresses: list[Multiaddr]
    told_from: str


def _addresses(peer: Message.Peer) -> list[Multiaddr]:
    """The addresses that a peer has signed itself; none where only other peers claim them."""
    if not 0 < len(peer.signedRecord) <= PEER_ENVELOPE_BYTES_MAX:
        return []
    try:
        _, record = consume_envelope(peer.signedRecord, "libp2p-peer-record")
    except Exception:  # the library raises errors of any kind
        logger.debug("a signed record that isn't one")
        return []
    return list(record.addrs[:ADDRESSES_PER_PEER_MAX]) if record.peer_id.to_bytes() == peer.id else []


def _closer_peers(answer: Message) -> list[Message.Peer]:
    return [peer for peer in answer.closerPeers[:BUCKET_SIZE] if len(peer.id) <= PEER_ID_BYTES_MAX]


class NodeDht(KadDHT):
    """Provider records only, in server mode; streams bounded in number and time."""

    def __init__(self, host: IHost, dial: Dial, tier: Callable[[PeerId], Tier]) -> None:
        super().__init__(host, DHTMode.SERVER)
        self.routing_table = _ConnectedOnly(host.get_id(), host, max_peers_per_subnet=0)
        self.peer_routing.routing_table = self.routing_table
        self.value_store = _NoValues(host, host.get_id())
        self.provider_store: NodeProviders = NodeProviders(host, self.peer_routing, self.routing_table, dial)
        self._provider_rate_max = PROVIDER_MESSAGES_PER_10_S
        self._inbound_limiter = trio.CapacityLimiter(math.inf)  # a stream that lost its place stays in it for a moment
        self._tier = tier
        self._places = PeerRoom(DHT_STREAMS_PER_PEER_MAX, DHT_STREAMS_OF_STRANGERS_MAX, DHT_STREAMS_MAX)

    async def handle_stream(self, stream: INetStream) -> None:
        """Serve one peer's stream, for a bounded time."""
        peer, scope = PeerId(stream.muxed_conn.peer_id.to_base58()), trio.CancelScope()
        place = Hold(peer, self._tier(peer), scope.cancel)
        if not self._places.take(place, 1):
            await stream.reset()
            return
        try:
            scope.deadline = trio.current_time() + DHT_STREAM_S
            with scope:
                await super().handle_stream(stream)
            if scope.cancelled_caught:
                await stream.reset()
        finally:
            self._places.give_back(place)

    async def _run_main_loop(self) -> None:
        # The core decides which peers to know (peer exchange), so nothing here searches for peers.
        while True:
            await trio.sleep(MAINTENANCE_S)
            try:
                self.provider_store.cleanup_expired()
                await self.provider_store.renew()
            except Exception:
                logger.exception("what this node provides was not renewed")
