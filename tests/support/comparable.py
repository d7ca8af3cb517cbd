"""The content of vLLM's answer, without what may differ between two: ids, times, and where frames are cut."""

import json
import re
from typing import Any

import httpx

Json = dict[str, Any]

# The load reports differ, but not whether there is one.
_HEADERS = ("content-type", "endpoint-load-metrics")
_DRAWN = frozenset({"id", "call_id", "item_id", "signature"})
_OF_ONE_RUN = frozenset({"created", "created_at", "completed_at", "sequence_number"})
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def comparable(response: httpx.Response) -> Any:
    """The status, the headers that are vLLM's, and the body as data."""
    headers = {name: response.headers[name].split(" ")[0] for name in _HEADERS if name in response.headers}
    return response.status_code, headers, _body(response)


def _body(response: httpx.Response) -> Any:
    kind = response.headers.get("content-type", "")
    if kind == "application/json":
        return _cleaned(response.json())
    if not kind.startswith("text/event-stream"):
        return response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    events = [_cleaned(json.loads(line)) for line in lines if line != "[DONE]"]
    ended = lines[-1:] == ["[DONE]"]
    if any("choices" in event for event in events):
        return _chunks(events), ended
    return _merged(events), ended


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "drawn" if name in _DRAWN and isinstance(each, str) else _cleaned(each)
            for name, each in value.items()
            if name not in _OF_ONE_RUN
        }
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    return _ADDRESS.sub("0x", value) if isinstance(value, str) else value


def _chunks(events: list[Json]) -> Json:
    """A stream of completions or chats: the complete choices, and what surrounds them."""
    choices: dict[int, Json] = {}
    around: Json = {"errors": [event for event in events if "choices" not in event]}
    for event in events:
        for choice in event.pop("choices", ()):
            into = choices.setdefault(choice["index"], {"calls": {}})
            delta = choice.pop("delta", {})
            for call in delta.pop("tool_calls", None) or ():
                function = call.pop("function", None) or {}
                _add(into["calls"].setdefault(call["index"], {}), call | function)
            _add(into, {**choice, **delta})
            if choice.get("finish_reason"):
                around.setdefault("beside the end", set()).update(event)
        around |= {name: value for name, value in event.items() if value is not None}
    return around | {"choices": choices}


def _add(into: Json, piece: Json) -> None:
    """Text and lists are continued; of all else the last value counts."""
    for name, value in piece.items():
        if value is None or (name == "arguments" and not value):
            continue
        if name in ("content", "reasoning", "text", "arguments", "token_ids"):
            into[name] = into[name] + value if name in into else value
        elif name == "logprobs":
            _add_lists(into.setdefault(name, {}), value)
        else:
            into[name] = value


def _add_lists(into: Json, lists: Json) -> None:
    for name, values in lists.items():
        into[name] = into.get(name, []) + (values or [])


def _merged(events: list[Json]) -> list[Json]:
    """A stream of named events, with the deltas of one thing merged."""
    merged: list[Json] = []
    for event in events:
        piece, text = _piece(event)
        if piece is None:
            merged.append(event)
        elif merged and merged[-1].get("of") == piece:
            merged[-1]["text"] += text
        else:
            merged.append({"of": piece, "text": text})
    # A tool without input gets an empty object or no event.
    return [event for event in map(_read, merged) if event.get("text") != {}]


def _piece(event: Json) -> tuple[Json | None, str]:
    """The thing that a delta continues, and the continuation."""
    delta = event.get("delta")
    if event.get("type") == "content_block_delta" and isinstance(delta, dict):
        (name,) = delta.keys() - {"type"}
        return {**event, "delta": delta["type"]}, delta[name]
    if str(event.get("type")).endswith(".delta") and isinstance(delta, str):
        return {name: value for name, value in event.items() if name not in ("delta", "logprobs")}, delta
    return None, ""


def _read(event: Json) -> Json:
    """The JSON of a tool's input, in which white space has no meaning."""
    if event.get("of", {}).get("delta") != "input_json_delta":
        return event
    try:
        return {**event, "text": json.loads(event["text"])}
    except ValueError:
        return event
