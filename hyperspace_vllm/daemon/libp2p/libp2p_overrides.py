"""The parts of py-libp2p 0.8.1 that can only be changed for the whole process, and how its services are run.

With the library alone, a single malformed message ends a host. `test_libp2p_host.py` fails when the library's side of
an override changes; overrides that need more code are in libp2p_swarm, libp2p_dht, libp2p_gossip and libp2p_yamux.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import libp2p.host.basic_host as basic_host_module
import libp2p.host.ping as ping_module
import libp2p.identity.identify_push.identify_push as identify_push_module
import libp2p.kad_dht.kad_dht as kad_module
import libp2p.kad_dht.peer_routing as peer_routing_module
import libp2p.kad_dht.provider_store as provider_module
import libp2p.network.connection.swarm_connection as swarm_connection_module
import libp2p.network.swarm as swarm_module
import libp2p.protocol_muxer.generic_selector as selector_module
import libp2p.protocol_muxer.multiselect_communicator as communicator_module
import libp2p.pubsub.gossipsub as gossipsub_module
import libp2p.pubsub.pubsub as pubsub_module
import trio
from libp2p.abc import IHost
from libp2p.crypto.keys import KeyType
from libp2p.crypto.rsa import RSAPublicKey
from libp2p.crypto.secp256k1 import Secp256k1PublicKey
from libp2p.crypto.serialization import key_type_to_public_key_deserializer
from libp2p.exceptions import ParseError
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import MessageTooLarge
from libp2p.io.utils import read_exactly
from libp2p.kad_dht.pb.kademlia_pb2 import Message as DhtMessage
from libp2p.kad_dht.utils import maybe_consume_signed_record as consume_dht_record
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.tools.anyio_service import Service
from libp2p.tools.anyio_service.trio_manager import TrioManager
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from . import libp2p_time
from .libp2p_dht import DHT_FIELDS_MAX, DHT_IDLE_S, DHT_MESSAGE_BYTES_MAX, PROVIDER_RENEWAL_S, PROVIDER_TTL_S, QUERY_S
from .libp2p_fields import count_fields
from .libp2p_gossip import GossipQueue, check_record
from .libp2p_pnet import PrivateConnection
from .libp2p_swarm import (
    IDENTIFY_BYTES_MAX,
    PEER_ENVELOPE_BYTES_MAX,
    PEER_ID_BYTES_MAX,
    PROTOCOL_NAME_BYTES_MAX,
    PROTOCOL_NAMES_MAX,
)

logger = logging.getLogger(__name__)


def patch_library() -> None:
    """Apply the overrides of the whole process; safe to call again."""
    replaced: dict[str, Any] = {
        "QUERY_TIMEOUT": QUERY_S,
        "ID": _ShortId,
        "MAX_DHT_MESSAGE_SIZE": DHT_MESSAGE_BYTES_MAX,
        "PROVIDER_RECORD_EXPIRATION_INTERVAL": PROVIDER_TTL_S,
        "PROVIDER_RECORD_REPUBLISH_INTERVAL": PROVIDER_RENEWAL_S,
        "RpcQueue": GossipQueue,  # otherwise 32 messages, and more are lost silently
        "read_delim": _read_protocol_name,
        "MultiselectCommunicator": _Negotiation,
        "read_exactly": _read_ping,
        "read_length_prefixed_protobuf": _read_identify,
        "read_varint_prefixed_bytes_limited": _read_dht_message,
        "new_protected_conn": PrivateConnection,  # otherwise a cipher that no other libp2p speaks
        "maybe_consume_signed_record": check_record,
        # It logs through the root logger, which then gets a handler that writes to stderr.
        "logging": logging.getLogger("libp2p.network.connection"),
    }
    for module, names in _REPLACED_IN:
        for name in names:
            assert hasattr(module, name), f"py-libp2p has changed: no {name} in {module.__name__}"
            setattr(module, name, replaced[name])
    for module in (kad_module, peer_routing_module):
        module.maybe_consume_signed_record = _check_dht_record  # type: ignore[attr-defined]
    # An RSA key of 400,000 bits costs minutes, in a handshake or in a signed record; our nodes have Ed25519 keys.
    for kind in (KeyType.RSA, KeyType.Secp256k1):
        key_type_to_public_key_deserializer.pop(kind.value, None)
    for key in (RSAPublicKey, Secp256k1PublicKey):
        key.from_bytes = _refuse_key  # type: ignore[method-assign]
    library = logging.getLogger("libp2p")
    library.setLevel(logging.CRITICAL)
    library.propagate = False
    if not library.handlers:
        library.addHandler(logging.NullHandler())


_DHT_NAMES = ("QUERY_TIMEOUT", "MAX_DHT_MESSAGE_SIZE")
_REPLACED_IN: tuple[tuple[ModuleType, tuple[str, ...]], ...] = (
    (kad_module, (*_DHT_NAMES, "ID", "read_varint_prefixed_bytes_limited")),
    (peer_routing_module, _DHT_NAMES),
    (
        provider_module,
        (*_DHT_NAMES, "PROVIDER_RECORD_EXPIRATION_INTERVAL", "PROVIDER_RECORD_REPUBLISH_INTERVAL"),
    ),
    (pubsub_module, ("RpcQueue",)),
    (gossipsub_module, ("maybe_consume_signed_record",)),
    (communicator_module, ("read_delim",)),
    (selector_module, ("MultiselectCommunicator",)),
    (basic_host_module, ("MultiselectCommunicator", "read_length_prefixed_protobuf")),
    (identify_push_module, ("read_length_prefixed_protobuf",)),
    (ping_module, ("read_exactly",)),
    (swarm_connection_module, ("logging",)),
    (swarm_module, ("new_protected_conn",)),
)


def _refuse_key(data: bytes) -> Any:
    raise ValueError("a key that is not Ed25519")


class _ShortId(ID):
    # The library logs ids that peers sent: base58 of 64 KiB takes a second.
    def __init__(self, peer_id_bytes: bytes) -> None:
        if len(peer_id_bytes) > PEER_ID_BYTES_MAX:
            raise ValueError("peer id")
        super().__init__(peer_id_bytes)


class _Manager(TrioManager):
    """Runs a service whose tasks may fail: the library's own ends the service, and the host, at the first failure."""

    def run_task(
        self, async_fn: Any, *args: Any, daemon: bool = False, name: str | None = None, _internal: bool = False
    ) -> None:
        if _internal:  # the service itself
            super().run_task(async_fn, *args, daemon=daemon, name=name, _internal=True)
        else:
            assert self._task_nursery is not None
            # Without the library's tree of tasks, which it searches for every gossip message.
            self._task_nursery.start_soon(_forever if daemon else _once, async_fn, args)


async def _once(async_fn: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
    try:
        await async_fn(*args)
    except Exception as error:
        logger.debug("libp2p task %s failed: %r", getattr(async_fn, "__name__", async_fn), error)


async def _forever(async_fn: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
    while True:
        try:
            await async_fn(*args)
        except Exception as error:
            logger.warning("libp2p task %s failed: %r", getattr(async_fn, "__name__", async_fn), error)
        await trio.sleep(1)


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    """Run one of the library's services until the block ends."""
    manager = _Manager(service)
    service._manager = manager
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        await manager.wait_started()
        yield
        nursery.cancel_scope.cancel()


class _Negotiation(communicator_module.MultiselectCommunicator):
    # The library answers "na" to any number of names, before the peer has proved its identity.
    def __init__(self, read_writer: ReadWriteCloser) -> None:
        super().__init__(read_writer)
        self._names_left = PROTOCOL_NAMES_MAX

    async def read(self) -> str:
        if not self._names_left:
            raise MultiselectCommunicatorError("too many protocol names")
        self._names_left -= 1
        return await super().read()


async def _read_protocol_name(reader: ReadWriteCloser) -> bytes:
    # The library's own accepts any length up to 2^64, before the peer has proved its identity.
    try:
        name = await read_varint_prefixed_bytes_limited(reader, PROTOCOL_NAME_BYTES_MAX)
    except MessageTooLarge as error:
        raise ParseError("protocol name") from error
    if not name.endswith(b"\n") or not name.isascii():
        raise ParseError("protocol name")
    return name[:-1]


async def _read_dht_message(stream: Any, size_max: int) -> bytes:
    # The library answers any number of messages on a stream, and waits for them without a limit.
    with trio.fail_after(DHT_IDLE_S):
        message = await read_varint_prefixed_bytes_limited(stream, size_max)
    try:
        fields = count_fields(message, DhtMessage.DESCRIPTOR, DHT_FIELDS_MAX)
    except ParseError as error:
        stream.muxed_conn.refuse(f"DHT: {error}")
        raise
    await stream.muxed_conn.spend(libp2p_time.DHT_MESSAGE_S + fields * libp2p_time.DHT_FIELD_S)
    return message


def _check_dht_record(message: Any, host: IHost, peer_id: ID | None = None) -> bool:
    # The library parses a record of any size: 60 KiB of addresses cost a tenth of a second.
    record = message.senderRecord if isinstance(message, DhtMessage) else message.signedRecord
    return len(record) <= PEER_ENVELOPE_BYTES_MAX and consume_dht_record(message, host, peer_id)


async def _read_ping(stream: Any, size: int) -> bytes:
    # The library answers any number of pings on a stream.
    ping = await read_exactly(stream, size)
    await stream.muxed_conn.spend(libp2p_time.PING_S)
    return ping


async def _read_identify(stream: Any, use_varint_format: bool = True) -> bytes:
    # The library reads a MiB, and makes an address of every two bytes of it.
    try:
        message = await read_varint_prefixed_bytes_limited(stream, IDENTIFY_BYTES_MAX)
    except Exception:
        await stream.reset()  # otherwise it takes the following bytes for an identity without a length
        raise
    await stream.muxed_conn.spend(len(message) * libp2p_time.IDENTIFY_BYTE_S)
    return message
