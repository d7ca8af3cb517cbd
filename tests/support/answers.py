"""What tests look for in answers: the ids, and the words of the client that asked first."""

import json
from collections.abc import Iterator
from typing import Any

from hyperspace_vllm.core.response.request_fields import FIELDS, Endpoint

Json = dict[str, Any]

MARK = "alice's words"


def ids_in(value: object, name: str = "") -> Iterator[str]:
    """Every id in an answer or an event, except in tools' inputs."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from ids_in(each, key) if key not in ("input", "arguments") else ()
    elif isinstance(value, list):
        for each in value:
            yield from ids_in(each, name)
    elif name in ("id", "call_id", "item_id", "signature") and isinstance(value, str):
        yield value


def events(stream: bytes) -> list[Json]:
    return [json.loads(line[5:]) for line in stream.splitlines() if line.startswith(b"data: {")]


def canaries(endpoint: Endpoint) -> Json:
    """Every field that doesn't count for the key, and one that vLLM doesn't know, with words of the client's."""
    given: dict[type, object] = {str: MARK, dict: {MARK: MARK}, object: MARK, list: [MARK]}
    neutral = FIELDS[endpoint].neutral
    named = {name: next((given[kind] for kind in kinds if kind in given), None) for name, kinds in neutral.items()}
    for name in ("stream", "stream_options", "encoding_format", "endianness"):
        named.pop(name, None)
    return {name: value for name, value in named.items() if value is not None}
