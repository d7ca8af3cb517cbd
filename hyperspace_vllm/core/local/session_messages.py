"""The session of a client with its node: it opens, keeps its lease, asks for the node's status and ends."""

from typing import Annotated, Literal

from msgspec import Meta

from ..records.limits import RESPONSE_BYTES_MAX
from .message_fields import U16, U32, U63, Bytes16, Bytes32, LocalMessage, Name

LOCAL_PROTOCOL = 8


class Hello(LocalMessage, tag="hello", frozen=True):
    """First message of a session; `session` is 16 random bytes, new in every process and after a lost lease."""

    protocol: U32
    role: Literal["api", "scheduler", "worker", "cli"]
    session: Bytes16
    name: Name


class Welcome(LocalMessage, tag="welcome", frozen=True):
    """Answers Hello. `epoch` is random per node process: a new one means that everything leased is gone."""

    protocol: U32
    epoch: U63
    peer_id: Name
    network_id: Bytes32
    arena_path: Annotated[str, Meta(max_length=4096)]
    arena_bytes: U63


class Heartbeat(LocalMessage, tag="heartbeat", frozen=True):
    """Keeps the session's lease: every HEARTBEAT_MS, expires after LEASE_MS."""


class HeartbeatAck(LocalMessage, tag="heartbeat_ack", frozen=True):
    """The lease holds. `api_servers`: sessions of that role, this one included if it is one."""

    epoch: U63
    api_servers: U16


class LeaseLost(LocalMessage, tag="lease_lost", frozen=True):
    """The session is unknown or expired: forget every slab and say Hello with a new session."""


class Goodbye(LocalMessage, tag="goodbye", frozen=True):
    """Ends the session at once; everything it leased is free, staged rows that weren't named are dropped."""


class GetStatus(LocalMessage, tag="get_status", frozen=True):
    """Ask for what `hyperspace status` shows."""


class Status(LocalMessage, tag="status", frozen=True):
    """The node's status as a JSON document."""

    json: Annotated[bytes, Meta(max_length=RESPONSE_BYTES_MAX)]


class Rejected(LocalMessage, tag="rejected", frozen=True):
    """The last message broke the protocol; `detail` names the field."""

    detail: Name
