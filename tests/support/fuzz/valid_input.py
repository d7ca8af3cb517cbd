"""Valid input of every decoder, for a fuzzer to start from."""

import json

import msgspec
from nacl.signing import SigningKey

from hyperspace_vllm.core.local.slab import Slab
from hyperspace_vllm.core.records import peer_wire
from hyperspace_vllm.core.records.announcement import (
    Announcement,
    EvidenceEntry,
    PrefixEntry,
    ResponseEntry,
    encode_announcement,
)
from hyperspace_vllm.core.records.manifest import Manifest, RowEntry
from hyperspace_vllm.core.records.peer_record import PeerRecord
from hyperspace_vllm.core.records.registry_delta import RegistryDelta, encode_delta
from hyperspace_vllm.core.response.cache_proof import make_proof
from hyperspace_vllm.core.response.sealed_hit import make_hit

KEY = bytes(range(32))

AUTHOR = SigningKey(KEY)


def valid_manifest(rows: int = 1) -> Manifest:
    entries = tuple(RowEntry(bytes([row]) * 32, 1000, bytes(16)) for row in range(rows))  # type: ignore[arg-type]
    return Manifest(KEY, KEY, 768, bytes(12), bytes(48), KEY, 1, entries, bytes(64))  # type: ignore[arg-type]


def valid_peer_record() -> PeerRecord:
    known = {"models": (KEY,), "fingerprints": (KEY, KEY), "vram_digest": b"bloom"}
    return PeerRecord(KEY, AUTHOR.verify_key.encode(), 1, 2, "h:1", "h:2", **known).sign(AUTHOR)  # type: ignore[arg-type]


def valid_announcement(*entries: object) -> bytes:
    return encode_announcement(Announcement(KEY, AUTHOR.verify_key.encode(), 1, 1, entries), AUTHOR)  # type: ignore[arg-type]


def valid_delta(sequence: int) -> bytes:
    kind = "update" if sequence else "snapshot"
    delta = RegistryDelta(KEY, AUTHOR.verify_key.encode(), 1, sequence, kind, 2, b"loro")  # type: ignore[arg-type]
    return encode_delta(delta, AUTHOR)


def valid_hit() -> peer_wire.Hit:
    proof = make_proof(AUTHOR, KEY, KEY, b"{}", KEY, "vllm", 1)  # type: ignore[arg-type]
    return make_hit(KEY, KEY, bytes(12), b"{}", proof.encode(), bytes(32), 16)  # type: ignore[arg-type]


ANNOUNCEMENTS = [
    valid_announcement(ResponseEntry(KEY, 2), ResponseEntry(KEY, 3)),
    valid_announcement(PrefixEntry(KEY, KEY, bytes(48), 2)),
    valid_announcement(EvidenceEntry(KEY, KEY, KEY, KEY, 1, bytes(64), 40, 2)),
]
DELTAS = [valid_delta(0), valid_delta(1)]


def sidecar_sample() -> bytes:
    fields = [1, valid_manifest().encode(), bytes(64 * 32), bytes(48), True, [b"\xff" * 8]]
    return b"\xff" + msgspec.msgpack.encode(fields)


def stream_sample(chat: bool) -> bytes:
    said = {"delta": {"role": "assistant", "content": "hi"}} if chat else {"text": "hi"}
    head = {"id": "x", "object": "chat.completion.chunk" if chat else "text_completion", "created": 1, "model": "m"}
    frames = [
        {**head, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": "stop", "stop_reason": None}]},
        {**head, "choices": [], "usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}},
    ]
    return b"".join(b"data: " + json.dumps(frame).encode() + b"\n\n" for frame in frames) + b"data: [DONE]\n\n"


_BLOCKS = [{"type": "thinking", "thinking": "a", "signature": "s"}, {"type": "text", "text": "b"}]
MESSAGE = {
    "id": "m", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
    "content": [*_BLOCKS, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1]}}],
    "usage": {"input_tokens": 1, "output_tokens": 2},
}  # fmt: skip
_ITEMS = [
    {
        "id": "i",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "a", "logprobs": []}],
    },
    {"id": "j", "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
]
RESPONSE = {"id": "r", "object": "response", "created_at": 1, "model": "m", "status": "completed", "output": _ITEMS}
SIDECAR_DIGEST = valid_manifest().digest.hex()
SLAB = Slab(3, 65536, 4096, 7)
CHAT = {
    "model": "m", "temperature": 0.5, "stream": True, "stream_options": {"include_usage": True},
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"},
                 {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}],
}  # fmt: skip
