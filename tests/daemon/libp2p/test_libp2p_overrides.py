"""The py-libp2p that is installed is the one that our overrides were written against."""

import asyncio
import math
from importlib.metadata import version

import libp2p.kad_dht.kad_dht as kad_module
import libp2p.kad_dht.provider_store as provider_module
import libp2p.peer.pb.crypto_pb2 as crypto_pb2
import pytest
import trio
from libp2p.crypto.exceptions import MissingDeserializerError
from libp2p.crypto.rsa import RSAPublicKey
from libp2p.crypto.secp256k1 import Secp256k1PublicKey
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.peer.envelope import pub_key_from_protobuf
from nacl.signing import SigningKey

from hyperspace_vllm.daemon.libp2p import (
    libp2p_dht,
    libp2p_gossip,
    libp2p_swarm,
)
from hyperspace_vllm.daemon.libp2p.libp2p_node import Libp2pNode, NodeSettings
from hyperspace_vllm.daemon.libp2p.libp2p_overrides import patch_library
from tests.support.libp2p_members import TOPIC, Silent

pytestmark = pytest.mark.io


def test_the_library_is_the_one_that_was_read() -> None:
    """Everything below was found by reading this version; read the next one before changing the number."""
    assert version("libp2p") == "0.8.1"


@pytest.mark.parametrize(
    "ours",
    [
        libp2p_swarm.NodeSwarm,
        libp2p_swarm.NodePeerStore,
        libp2p_swarm.NodeHost,
        libp2p_swarm.NodeTransport,
        libp2p_swarm.NodeUpgrader,
        libp2p_swarm._NoAutoConnector,
        libp2p_dht.NodeDht,
        libp2p_dht.NodeProviders,
        libp2p_dht._ConnectedOnly,
        libp2p_dht._NoValues,
        libp2p_gossip.NodeGossip,
        libp2p_gossip.NodePubsub,
        libp2p_gossip.GossipQueue,
    ],
)
def test_every_overridden_method_is_still_the_librarys(ours: type) -> None:
    new = {
        *("live", "host_of", "drop", "close_sockets", "_has_room", "forget", "_least", "renew", "_tell", "may_pass_on"),
        *("keep_ours", "_take", "_forget", "_ask_closer", "_query", "_walk", "_learn_addresses", "keep_due"),
    }
    for name, value in vars(ours).items():
        if callable(value) and name not in new and not name.startswith("__"):
            assert any(name in vars(base) for base in ours.__mro__[1:]), f"{ours.__name__}.{name} overrides nothing"


async def test_every_default_of_the_library_that_matters_is_set() -> None:
    async def main() -> None:
        node = Libp2pNode(NodeSettings(SigningKey.generate(), "127.0.0.1:0", bytes(32), (), (TOPIC,)), Silent())
        for module in (kad_module, provider_module):
            assert module.QUERY_TIMEOUT == 1.5
        assert provider_module.PROVIDER_RECORD_EXPIRATION_INTERVAL == 15 * 60
        assert provider_module.PROVIDER_RECORD_REPUBLISH_INTERVAL == 5 * 60
        dht, gossip, swarm = node._dht, node._gossip, node._swarm
        # Names that the library reads: were they renamed, these would be ours alone and do nothing.
        for name in ("_provider_rate_max", "_inbound_limiter", "value_store", "provider_store", "routing_table"):
            assert f"self.{name}" in _source(kad_module), name
        assert dht._provider_rate_max == libp2p_dht.PROVIDER_MESSAGES_PER_10_S
        assert dht._inbound_limiter.total_tokens == math.inf  # our own bound makes room
        assert not gossip.spam_protection_enabled
        assert not gossip.eclipse_protection_enabled
        assert not gossip.adaptive_gossip_enabled
        assert gossip.heartbeat_interval == 1
        assert swarm.connection_config.max_connections == 64
        assert swarm.retry_config.max_retries == 0
        assert swarm.psk == bytes(32).hex()
        # Noise and our yamux, nothing else: the library's own offer holds plaintext and SECIO.
        assert list(swarm.upgrader.security_multistream.transports) == ["/noise"]
        assert list(swarm.upgrader.muxer_multistream.transports) == ["/yamux/1.0.0"]
        node._pubsub.seen_messages.stop()

    await asyncio.to_thread(trio.run, main)


def _source(module: object) -> str:
    with open(module.__file__) as file:  # type: ignore[attr-defined]
        source: str = file.read()
        return source


@pytest.mark.parametrize("kind", [RSAPublicKey, Secp256k1PublicKey])
def test_keys_of_no_node_are_refused_before_they_are_read(kind: type[RSAPublicKey | Secp256k1PublicKey]) -> None:
    """An RSA key of 60 KiB keeps the library busy for seconds, in a handshake or a signed record."""
    patch_library()
    number = crypto_pb2.RSA if kind is RSAPublicKey else crypto_pb2.Secp256k1
    with pytest.raises(ValueError, match="not Ed25519"):
        kind.from_bytes(b"key")
    with pytest.raises(ValueError, match="not Ed25519"):
        pub_key_from_protobuf(crypto_pb2.PublicKey(Type=number, Data=b"key"))
    with pytest.raises(MissingDeserializerError):
        deserialize_public_key(crypto_pb2.PublicKey(Type=number, Data=b"key").SerializeToString())
