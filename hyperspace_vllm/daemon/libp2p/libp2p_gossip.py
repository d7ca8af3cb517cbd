"""GossipSub for py-libp2p: our topics only, and only messages that the core's gate accepts.

The library passes ten messages a second per peer, loses bursts of more than 32 silently, keeps a time stamp for every
message and an entry for every topic that any peer names, and connects to every peer that a PRUNE lists.
"""

import logging
import random
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import IOException, MessageTooLarge
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.pubsub.utils import maybe_consume_signed_record, safe_bytes_from_hex
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from ...core.peers.eviction import select_evicted
from ...core.peers.gossip_gate import message_cost
from ...core.records.limits import KiB, MiB
from ...core.records.rank import Acquaintance
from . import libp2p_time
from .libp2p_fields import count_fields
from .libp2p_swarm import PEER_ENVELOPE_BYTES_MAX, PEER_ID_BYTES_MAX, PEERS_KEPT_MAX

GOSSIP_BYTES_MAX = 64 * KiB
GOSSIP_RPC_BYTES_MAX = 256 * KiB
GOSSIP_QUEUE_MAX = 128
GOSSIP_QUEUE_BYTES_MAX = 2 * MiB
# A full RPC of an honest node has fewer: a message id takes 46 bytes, and a message's seven fields 300 or more.
GOSSIP_FIELDS_MAX = GOSSIP_RPC_BYTES_MAX // 40
FIELDS_AT_ONCE = 64  # before other tasks get their turn
CONTROL_ENTRIES_MAX = 64
CONTROL_IDS_MAX = 1_000
SENT_AGAIN_MAX = 3  # times that a message is sent to a neighbour that wants it, as in go-libp2p
HEARTBEAT_S = 1
CANDIDATES_MAX = 1_000  # for a place in a mesh: all connected peers
BACK_OFF_MAX_S = 600  # the longest that a PRUNE may ask for; ten times what GossipSub's own asks

logger = logging.getLogger(__name__)


class GossipQueue(RpcQueue):
    """A neighbour's outgoing messages, bounded in number and bytes."""

    def __init__(self) -> None:
        super().__init__(max_size=GOSSIP_QUEUE_MAX, max_message_size=GOSSIP_RPC_BYTES_MAX)
        self._bytes = 0

    def push(self, rpc: rpc_pb2.RPC, priority: bool = False) -> bool:
        """Queue the RPC, unless there is no room."""
        size = rpc.ByteSize()
        if self._bytes + size > GOSSIP_QUEUE_BYTES_MAX or not super().push(rpc, priority):
            return False
        self._bytes += size
        return True

    async def pop(self) -> rpc_pb2.RPC | None:
        """The next RPC."""
        rpc = await super().pop()
        if rpc is not None:
            self._bytes -= rpc.ByteSize()
        return rpc


class NodeGossip(GossipSub):
    """GossipSub 1.1 on our topics only; peer exchange and adaptive features off.

    The library fills and thins a mesh at random, so that eight strangers take most of its places. Here peers with a
    better `acquaintance` are added first and stay longest; among equals, those of the host with the fewest peers.
    """

    def __init__(self, topics: frozenset[str], acquaintance: Callable[[ID], Acquaintance]) -> None:
        super().__init__(
            protocols=[TProtocol("/meshsub/1.1.0")],
            # With the usual 6, 4 and 12 a network of ten sends every message eight times, at 0.4 ms a copy; the
            # heartbeat's IHAVEs and the registry make up for what a sparse mesh loses to frozen neighbours.
            degree=4,
            degree_low=3,
            degree_high=6,
            heartbeat_interval=HEARTBEAT_S,
            do_px=False,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,  # it allows ten messages a second; GossipGate bounds authors instead
            eclipse_protection_enabled=False,
            max_pending_messages_per_peer=8,
        )
        self._topics = topics
        self._acquaintance = acquaintance
        self._caught_up: set[tuple[ID, str]] = set()
        self._sent_again: dict[bytes, Counter[ID]] = {}  # by message id, of messages in the cache only

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """Queue the messages of the last seconds for a new neighbour, at its price, once per connection.

        The library writes them past the queue, and again after each unsubscribing.
        """
        stream: Any = self.pubsub.peers.get(peer_id) if self.pubsub else None
        if stream is not None and (peer_id, topic) not in self._caught_up:
            self._caught_up.add((peer_id, topic))
            found = [self.mcache.get(message_id) for message_id in self.mcache.window(topic)]
            recent = [message for message in found if message is not None]
            size = sum(message.ByteSize() for message in recent)
            await stream.muxed_conn.spend(size * libp2p_time.SENT_BYTE_S)
            for message in recent:
                self.send_rpc(peer_id, rpc_pb2.RPC(publish=[message]))

    async def flush_pending_messages(self, peer_id: ID) -> None:
        """Drop what was published before the neighbour's stream was open: send_recent_messages sends it."""
        self._pending_messages.pop(peer_id, None)

    def remove_peer(self, peer_id: ID) -> None:
        """Forget a neighbour that has disconnected."""
        super().remove_peer(peer_id)
        self._caught_up = {each for each in self._caught_up if each[0] != peer_id}

    def _select_peers_for_pruning(self, topic: str, num_to_prune: int) -> list[ID]:
        return self._least(self.mesh[topic], len(self.mesh[topic]) - num_to_prune)

    def _get_in_topic_gossipsub_peers_from_minus(
        self, topic: str, num_to_select: int, minus: Iterable[ID], backoff_check: bool = False
    ) -> list[ID]:
        pool = super()._get_in_topic_gossipsub_peers_from_minus(topic, CANDIDATES_MAX, minus, backoff_check)
        left_out = self._least(pool, num_to_select)
        return [peer_id for peer_id in pool if peer_id not in left_out]

    def gossip_heartbeat(self) -> defaultdict[ID, dict[str, list[bytes]]]:
        """Message ids to announce by IHAVE, by peer and topic.

        Unlike the library's, it includes peers pruned a minute ago or less. Once a second it removes the back-offs that
        have ended (the library keeps those of peers that left), and the counts of messages that have left the cache.
        """
        self._sent_again = {each: count for each, count in self._sent_again.items() if each in self.mcache.msgs}
        now_s = time.time()
        for topic, ends in self.back_off.items():
            self.back_off[topic] = {peer_id: end_s for peer_id, end_s in ends.items() if end_s > now_s}
        told: defaultdict[ID, dict[str, list[bytes]]] = defaultdict(dict)
        subscribed = self.pubsub.peer_topics if self.pubsub else {}
        for topic in self.mesh.keys() & subscribed.keys():
            if messages := self.mcache.window(topic):
                mesh = self.mesh[topic]
                count = self._get_adaptive_gossip_peers_count(topic, len(subscribed[topic] - mesh))
                for peer_id in self._get_in_topic_gossipsub_peers_from_minus(topic, count, mesh):
                    told[peer_id][topic] = list(messages)
        return told

    def _least(self, peers: Iterable[ID], room: int) -> list[ID]:
        """The peers that must leave for `room` to stay."""
        held = [(peer_id, self._acquaintance(peer_id), 1) for peer_id in peers]
        random.shuffle(held)
        return select_evicted(held, max(room, 0), len(held))

    def keep_ours(self, control: Any) -> int:
        """Drop control messages that exceed the bounds or aren't about our topics; returns how many are left."""
        for field in (control.graft, control.prune, control.ihave):
            kept = {entry.topicID: entry for entry in field if entry.topicID in self._topics}
            if len(kept) != len(field):
                ours = list(kept.values())
                del field[:]
                field.extend(ours)
        for entry in control.prune:
            entry.backoff = min(entry.backoff, BACK_OFF_MAX_S)
        for field in (control.ihave, control.iwant, control.idontwant):
            del field[CONTROL_ENTRIES_MAX:]
            for entry in field:
                # For an id that is wanted a thousand times the library would send a thousand copies.
                entry.messageIDs[:] = list(dict.fromkeys(entry.messageIDs))[:CONTROL_IDS_MAX]
        kinds = control.graft, control.prune, control.ihave, control.iwant, control.idontwant
        return sum(len(entries) for entries in kinds)

    def keep_due(self, peer_id: ID, control: Any) -> int:
        """Drop the wanted ids of messages that the cache has lost, or that the neighbour has been sent three times.

        Returns the size of the others in bytes.
        """
        size = 0
        for entry in control.iwant:
            due: list[bytes] = []
            for wanted in entry.messageIDs:
                message_id = safe_bytes_from_hex(wanted) or b""
                message = self.mcache.get(message_id)
                if message is None:
                    continue
                sent = self._sent_again.setdefault(message_id, Counter())
                if sent[peer_id] < SENT_AGAIN_MAX:
                    sent[peer_id] += 1
                    due.append(wanted)
                    size += message.ByteSize()
            entry.messageIDs[:] = due
        return size

    async def _do_px(self, px_peers: Any) -> None:
        return

    def _check_equivocation(self, msg: rpc_pb2.Message) -> bool:
        return True  # it keeps 1,000 messages; the seen cache drops the second one

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Pass a message on."""
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()  # a time stamp per message, for a feature that is off


class NodePubsub(Pubsub):
    """Messages on our topics that `judge` accepts, handed to `on_message(topic, relay, payload)` and passed on."""

    def __init__(
        self,
        host: IHost,
        router: NodeGossip,
        topics: frozenset[str],
        judge: Callable[[ID, rpc_pb2.Message], bool],
        on_message: Callable[[str, ID, bytes], None],
    ) -> None:
        super().__init__(
            host,
            router,
            max_inbound_rpc_size=GOSSIP_RPC_BYTES_MAX,
            max_subscriptions_per_rpc=CONTROL_ENTRIES_MAX,
            max_subscriptions_per_peer=len(topics),
            allowed_topics=topics,
        )
        self._router = router
        self._topics = topics
        self._judge = judge
        self._greeting: set[ID] = set()
        self._on_message = on_message

    async def continuously_read_stream(self, stream: INetStream) -> None:
        """Handle a neighbour's RPCs, charging each and its contents at their price, until the stream ends.

        Raises ParseError for an RPC that is too long; one that is malformed, or has too many fields, ends the
        connection.
        """
        conn: Any = stream.muxed_conn
        try:
            while self.manager.is_running:
                raw = await read_varint_prefixed_bytes_limited(stream, GOSSIP_RPC_BYTES_MAX)
                fields = count_fields(raw, rpc_pb2.RPC.DESCRIPTOR, GOSSIP_FIELDS_MAX)
                await conn.spend(libp2p_time.GOSSIP_RPC_S + fields * libp2p_time.GOSSIP_FIELD_S)
                await self._take(rpc_pb2.RPC.FromString(raw), conn)
        except ParseError as error:
            conn.refuse(f"gossip: {error}")
        except MessageTooLarge as error:
            raise ParseError("gossip RPC") from error
        except (StreamError, IOException, RawConnError):
            return

    async def _take(self, rpc: Any, conn: Any) -> None:
        """Handle one RPC; a neighbour's time also pays for messages that are then ignored."""
        peer_id = conn.peer_id
        if not check_record.knows(rpc, peer_id):
            await conn.spend(libp2p_time.GOSSIP_RECORD_S)
        if not check_record(rpc, self.host, peer_id):
            return
        for number, msg in enumerate(rpc.publish):
            if self._is_subscribed_to_msg(msg):
                await conn.spend(libp2p_time.GOSSIP_MESSAGE_S * message_cost(len(msg.data)))
                await self.push_msg(peer_id, msg)
            elif number % FIELDS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        for subscription in rpc.subscriptions[:CONTROL_ENTRIES_MAX]:
            await conn.spend(libp2p_time.GOSSIP_CONTROL_S)
            self.handle_subscription(peer_id, subscription)
        if rpc.HasField("control"):
            entries = self._router.keep_ours(rpc.control)
            wanted_bytes = self._router.keep_due(peer_id, rpc.control)
            await conn.spend(entries * libp2p_time.GOSSIP_CONTROL_S + wanted_bytes * libp2p_time.SENT_BYTE_S)
            await self._router.handle_rpc(rpc, peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Take a message from a neighbour (or this node), and deliver and pass it on if it is accepted."""
        if not self._is_subscribed_to_msg(msg):
            return
        if msg_forwarder != self.my_id:
            if ID(msg.from_id) == self.my_id or not self._judge(msg_forwarder, msg):
                return
            self._on_message(msg.topicIDs[0], msg_forwarder, bytes(msg.data))
        # The library's version repeats checks that the judge has made, and keeps each verdict for minutes.
        self._mark_msg_seen(msg)
        await self.router.publish(msg_forwarder, msg)

    def forget(self, peer_id: ID) -> None:
        """Forget a neighbour that has disconnected."""
        self._handle_dead_peer(peer_id)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        # One at a time: of two, the library forgets the first one's queue, whose task then waits for ever.
        if peer_id not in self._greeting:
            self._greeting.add(peer_id)
            try:
                await super()._handle_new_peer(peer_id)
            finally:
                self._greeting.discard(peer_id)

    def _is_subscribed_to_msg(self, msg: rpc_pb2.Message) -> bool:
        # Checked before a task is created for the message: most that arrive are copies of one that we have.
        if len(msg.topicIDs) != 1 or msg.topicIDs[0] not in self._topics or len(msg.data) > GOSSIP_BYTES_MAX:
            return False
        return len(msg.from_id) <= PEER_ID_BYTES_MAX and len(msg.seqno) <= 16 and not self._is_msg_seen(msg)

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        """Do nothing: the library's queues of 32 are not read."""


class _Once:
    """Checks a sender's signed addresses once: the library verifies them twice for every gossip message."""

    def __init__(self, check: Callable[..., bool]) -> None:
        self._check = check
        self._known: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()

    def knows(self, msg: rpc_pb2.RPC, peer_id: ID) -> bool:
        """Whether the record needs no check."""
        return not msg.senderRecord or (peer_id.to_bytes(), msg.senderRecord) in self._known

    def __call__(self, msg: rpc_pb2.RPC, host: IHost, peer_id: ID) -> bool:
        key = peer_id.to_bytes(), msg.senderRecord
        if key in self._known:
            return True
        if len(msg.senderRecord) > PEER_ENVELOPE_BYTES_MAX or not self._check(msg, host, peer_id):
            return False
        self._known[key] = None
        if len(self._known) > PEERS_KEPT_MAX:
            self._known.popitem(last=False)
        return True


check_record = _Once(maybe_consume_signed_record)
