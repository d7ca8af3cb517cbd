"""One function for each decoder, with valid input to start from: it returns, or raises what is a bug."""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import blake3

from hyperspace_vllm.api.embeddings import Embedding, inputs_of
from hyperspace_vllm.api.embeddings import decode as decode_embedding
from hyperspace_vllm.api.streams.frames import collector as collector_of
from hyperspace_vllm.api.streams.frames import frames
from hyperspace_vllm.config import Config, ConfigError, load_config
from hyperspace_vllm.core.local.kv_messages import LookupPrefix, PrefixAnswer, PrefixesInMemory, RowStaged
from hyperspace_vllm.core.local.messages import decode_client_message, decode_node_message, encode
from hyperspace_vllm.core.local.response_cache_messages import (
    FindResponse,
    ResponseAudited,
    ResponseFound,
    ResponseHint,
    ResponseNotFound,
    ResponseToTry,
    StoreResponse,
)
from hyperspace_vllm.core.local.session_messages import Hello, Welcome
from hyperspace_vllm.core.local.slab import LoadedRow
from hyperspace_vllm.core.records import peer_wire, wire
from hyperspace_vllm.core.records.announcement import check_announcement, decode_announcement, encode_announcement
from hyperspace_vllm.core.records.errors import ProtocolViolation, Refused
from hyperspace_vllm.core.records.ids import peer_id, public_key_of
from hyperspace_vllm.core.records.limits import OBJECT_ROWS_MAX
from hyperspace_vllm.core.records.manifest import decode_manifest, digest_blob
from hyperspace_vllm.core.records.peer_record import check_peer_record, decode_peer_record
from hyperspace_vllm.core.records.registry_delta import check_delta, decode_delta, encode_delta
from hyperspace_vllm.core.response.admission import NotStored
from hyperspace_vllm.core.response.cache_proof import CacheProof, decode_proof
from hyperspace_vllm.core.response.request_fields import ENDPOINTS
from hyperspace_vllm.core.response.request_key import Uncacheable, choice_count, parse_request, request_key
from hyperspace_vllm.core.response.scope import RequestScope, sign_scope, verify_scope
from hyperspace_vllm.core.response.sealed_hit import open_hit
from hyperspace_vllm.core.response.similar.canonical import ACRONYMS
from hyperspace_vllm.core.response.similar.semantic_key import question_of
from hyperspace_vllm.daemon.kv.chunk_store import ChunkStore
from tests.support.fuzz.valid_input import (
    ANNOUNCEMENTS,
    AUTHOR,
    CHAT,
    DELTAS,
    KEY,
    MESSAGE,
    RESPONSE,
    SIDECAR_DIGEST,
    SLAB,
    sidecar_sample,
    stream_sample,
    valid_hit,
    valid_manifest,
    valid_peer_record,
)

Target = Callable[[bytes], None]

SECRET = b"secret"


def client_message(raw: bytes) -> None:
    with suppress(ProtocolViolation):
        assert decode_client_message(encode(message := decode_client_message(raw))) == message


def node_message(raw: bytes) -> None:
    with suppress(ProtocolViolation):
        assert decode_node_message(encode(message := decode_node_message(raw))) == message


def peer_request(raw: bytes) -> None:
    with suppress(ProtocolViolation):
        assert wire.decode_request(wire.encode(message := wire.decode_request(raw))) == message


def peer_reply(raw: bytes) -> None:
    with suppress(ProtocolViolation):
        assert wire.decode_reply(wire.encode(message := wire.decode_reply(raw))) == message


def stream_request(raw: bytes) -> None:
    with suppress(ProtocolViolation):
        message = peer_wire.decode_request(raw)
        assert peer_wire.decode_request(peer_wire.encode(message)) == message


def stream_answer(raw: bytes) -> None:
    """An answer on a libp2p stream; a hit is opened, too."""
    with suppress(ProtocolViolation, Refused):
        message = peer_wire.decode_answer(raw)
        assert peer_wire.decode_answer(peer_wire.encode(message)) == message
        if isinstance(message, peer_wire.Hit):
            opened = open_hit(message, KEY, KEY, KEY, lambda signer: True, lambda signer, tag: None, 1)  # type: ignore[arg-type]
            assert opened.body == b"{}"


def peer_record(raw: bytes) -> None:
    with suppress(ProtocolViolation, Refused):
        record = decode_peer_record(raw)
        assert record.encode() == raw
        check_peer_record(record, KEY, 1)  # type: ignore[arg-type]
        assert record == valid_peer_record()


def announcement(raw: bytes) -> None:
    with suppress(ProtocolViolation, Refused):
        batch = decode_announcement(raw)
        assert encode_announcement(batch, AUTHOR)[:-64] == raw[:-64]
        check_announcement(raw, batch, KEY, 1)  # type: ignore[arg-type]
        assert raw in ANNOUNCEMENTS


def registry_delta(raw: bytes) -> None:
    with suppress(ProtocolViolation, Refused):
        delta = decode_delta(raw)
        assert encode_delta(delta, AUTHOR)[:-64] == raw[:-64]
        check_delta(raw, delta, KEY, 1)  # type: ignore[arg-type]
        assert raw in DELTAS


def manifest(raw: bytes) -> None:
    with suppress(ProtocolViolation):
        assert decode_manifest(raw).encode() == raw


def digest_table(raw: bytes) -> None:
    with suppress(ProtocolViolation):
        assert len(digest_blob(raw[1:], raw[0] if raw else 0)) == 4096 * 32


def peer(raw: bytes) -> None:
    text = raw.decode("utf-8", "surrogateescape")
    with suppress(ProtocolViolation):
        assert peer_id(public_key_of(text)) == text


def cache_proof(raw: bytes) -> None:
    with suppress(ProtocolViolation):
        assert decode_proof(raw).encode() == raw


def sidecar(raw: bytes) -> None:
    """A chunk store's directory as a crash or a stranger may have left it; the checksum is made right half the time."""
    with tempfile.TemporaryDirectory(dir=_scratch()) as name:
        directory = Path(name)
        body = raw[1:] + (blake3.blake3(raw[1:]).digest() if raw[:1] > b"\x7f" else b"")
        (directory / f"{SIDECAR_DIGEST}.meta").write_bytes(body)
        (directory / f"{SIDECAR_DIGEST}.obj").touch()
        with (directory / f"{SIDECAR_DIGEST}.obj").open("r+b") as file:
            file.truncate(64 * 768)
        store = ChunkStore(directory, 1 << 30)
        assert store.rows <= OBJECT_ROWS_MAX


def request(raw: bytes) -> None:
    body = parse_request(raw)
    if isinstance(body, Uncacheable):
        return
    for endpoint in ENDPOINTS.values():
        key = request_key(endpoint, body, KEY, None, "")
        if not isinstance(key, Uncacheable):
            assert len(key) == 32
            assert request_key(endpoint, body, KEY, None, "") == key
            choice_count(endpoint, body)
            question = question_of(endpoint, body, KEY, None, "", ACRONYMS)
            assert question is None or len(question.canonical_key) == 32
            inputs = inputs_of(body)
            assert isinstance(inputs, Uncacheable) or inputs


def scope(raw: bytes) -> None:
    """What a client puts into kv_transfer_params.hyperspace; `raw` is JSON of [it, cache_salt]."""
    try:
        signed, salt = json.loads(raw)
    except (ValueError, TypeError, RecursionError):
        return
    verdict = verify_scope(SECRET, signed, salt if isinstance(salt, str) else None)
    assert verdict is None or isinstance(verdict, RequestScope)


def stream(raw: bytes) -> None:
    """The frames of an answer, by blank lines."""
    assert isinstance(decode_embedding(raw), Embedding | None)
    for endpoint in ENDPOINTS.values():
        collector = collector_of(endpoint)
        for frame in raw.split(b"\n\n"):
            assert collector.feed(frame) in ("other", "finish", "usage")
        body = collector.result()
        assert isinstance(body, NotStored) or isinstance(json.loads(body), dict)


def settings_file(raw: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=_scratch()) as name:
        path = Path(name) / "hyperspace.toml"
        path.write_bytes(raw)
        with suppress(ConfigError):
            assert isinstance(load_config({"HYPERSPACE_CONFIG": str(path)}), Config)


def settings_variables(raw: bytes) -> None:
    """Variables and kv_connector_extra_config, both as strings: `raw` is lines of NAME=value."""
    lines = raw.replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    with suppress(ConfigError):
        load_config({f"HYPERSPACE_{name.upper()}": value for name, value in values.items() if name != "config"})
    with suppress(ConfigError):
        load_config({}, values)


TARGETS: dict[str, tuple[Target, list[bytes]]] = {
    "client_message": (
        client_message,
        [
            encode(message)
            for message in (
                Hello(1, "worker", bytes(16), "host-1-0"),
                RowStaged("r", 0, 0, 0, SLAB),
                LookupPrefix(1, "r", (KEY, KEY), 0, 100, 1000, "private"),
                StoreResponse(KEY, "public", KEY, "0.32.0", 1000, b"{}"),
                FindResponse(1, KEY, KEY, 300),
                ResponseAudited(KEY, bytes(202), 40, 2, b"a client"),
                PrefixesInMemory(1000, (KEY,), (KEY, KEY)),
            )
        ],
    ),
    "node_message": (
        node_message,
        [
            encode(Welcome(1, 5, "12D3KooW", KEY, "/dev/shm/x", 1 << 20)),
            encode(PrefixAnswer(1, 1, (LoadedRow(0, 0, 0, SLAB),), "network", "blake3", "hit")),
            encode(ResponseHint(1, True)),
            encode(ResponseToTry(1, b"{}", bytes(202))),
            encode(ResponseFound(1, b"{}", bytes(202), 1, 2, "12D3KooW", "gossip", "members")),
            encode(ResponseNotFound(1, "not_found")),
        ],
    ),
    "peer_request": (
        peer_request,
        [wire.encode(wire.Have(1, (KEY,))), wire.encode(wire.GetChunks(1, KEY, 0, (0, 63)))],
    ),
    "peer_reply": (
        peer_reply,
        [
            wire.encode(wire.HaveReply(1, (wire.Offer(0, KEY, 31, bytes(8)),))),
            wire.encode(wire.ManifestReply(1, b"m", b"d", bytes(48))),
            wire.encode(wire.NotHere(1, "busy", (1,))),
        ],
    ),
    "stream_request": (
        stream_request,
        [
            peer_wire.encode(message)
            for message in (
                peer_wire.Query(KEY),
                peer_wire.Greet(b"record"),
                peer_wire.Ping(),
                peer_wire.WantPeers(bytes(32)),
                peer_wire.WantDeltas((peer_wire.RegistryHead(KEY, 1, 2),)),
            )
        ],
    ),
    "stream_answer": (
        stream_answer,
        [
            peer_wire.encode(message)
            for message in (
                valid_hit(),
                peer_wire.Miss("busy"),
                peer_wire.Greeting(b"record"),
                peer_wire.Pong(),
                peer_wire.Peers((b"record", b"record")),
                peer_wire.Deltas((b"delta",), (peer_wire.RegistryHead(KEY, 1, 2),), True),
                peer_wire.Refusal("stranger"),
            )
        ],
    ),
    "peer_record": (peer_record, [valid_peer_record().encode()]),
    "announcement": (announcement, ANNOUNCEMENTS),
    "registry_delta": (registry_delta, DELTAS),
    "manifest": (manifest, [valid_manifest().encode(), valid_manifest(3).encode()]),
    "digest_table": (digest_table, [b"\x01" + bytes(64 * 32)]),
    "peer": (peer, [peer_id(KEY).encode(), "1é".encode()]),
    "cache_proof": (cache_proof, [CacheProof(KEY, KEY, 1, KEY, KEY, "vllm 0.32", bytes(64)).encode()]),
    "sidecar": (sidecar, [sidecar_sample()]),
    "request": (
        request,
        [
            json.dumps(CHAT).encode(),
            json.dumps({"model": "m", "prompt": [[1, 2], [3]], "n": 2, "max_tokens": 1.0}).encode(),
            b'{"messages": [{"content": [{"type": []}]}]}',
            b'{"seed": ' + b"9" * 5000 + b"}",
            b'{"prompt": "\\ud800"}',
            b'{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "What is \\ud800?"}]}',
            b'{"input": [{"role": "user", "content": [{"type": "input_image", "image_url": 5}]}], "tools": [5]}',
            b'{"system": [{"cache_control": []}], "messages": [{"content": [{"type": "tool_result"}]}]}',
            b'{"input": [[1, true], "a"], "query": {}, "documents": [[]], "encoding_format": []}',
            b'{"tools": ' + b"[" * 5000,
            *(b'{"tools": ' + b"[" * depth + b"]" * depth + b"}" for depth in range(900, 1000, 3)),
        ],
    ),
    "scope": (
        scope,
        [
            json.dumps([sign_scope(SECRET, "network", "t", "s"), "s"]).encode(),
            b'[{"scope": "network", "tenant": "\\ud800", "mac": "a"}, "\\ud800"]',
            b'[{"scope": [], "tenant": "", "mac": ""}, null]',
        ],
    ),
    "stream": (
        stream,
        [
            stream_sample(True),
            stream_sample(False),
            b"".join(frames("messages", MESSAGE, False)),
            b"".join(frames("responses", RESPONSE, False)),
            b'event: message_start\ndata: {"type": "message_start", "message": {"id": "", "model": "", "content": []}}',
            b'event: response.completed\ndata: {"response": []}',
            b'{"id": "", "created": 1, "model": "", "data": [{"embedding": "AAAA"}], "usage": {}}',
            b"data: " + b"[" * 5000,
            b'data: "\xff"',
            b'data: ["\\ud800"]',
        ],
    ),
    "settings_file": (
        settings_file,
        [
            b'listen = "127.0.0.1:7790"\npeers = ["x@h:1"]\narena_bytes = "512MiB"\nfetch = "auto"\nnice = 3\n',
            b"nice = " + b"9" * 5000,
            b"nice = " + b"[" * 5000,
            b'data_dir = "~nobody-is-called-so/x"',
            b'listen = "h:' + b"1" * 5000 + b'"',
            b'data_dir = "a\\u0000b"',
        ],
    ),
    "settings_variables": (
        settings_variables,
        [
            b"listen=127.0.0.1:0\nkv_cache=no\ndisk_bytes=1GiB\npeers=a@b:1,c",
            b"data_dir=~nobody-is-called-so/x",
            b"metrics_listen=" + b"1" * 5000,
            b"data_dir=/\xff/x",
        ],
    ),
}


def run(name: str, raw: bytes) -> None:
    """One input to one decoder; anything raised is a bug."""
    TARGETS[name][0](raw)


def _scratch() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
