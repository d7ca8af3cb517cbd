"""Whether a request has everything that vLLM reads for it: otherwise its bytes do not determine its answer."""

from collections.abc import Callable, Mapping

from .request_fields import Endpoint

# Tuples: a client's value may not be hashable.
_TEXT_PARTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text", "refusal", "thinking")
_URL_PARTS = ("image_url", "audio_url", "video_url")
_CALLS = ("function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output")
_ITEMS = ("message", "reasoning", *_CALLS)
_OWN_TOOLS = ("function", "custom")  # run by the client; the server runs all others
_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_reference")
_TEXTS = ("query", "documents", "data_1", "data_2", "queries", "items", "text_1", "text_2")


def why_not_by_bytes(endpoint: Endpoint, body: Mapping[str, object]) -> str | None:
    """None if a request's bytes determine its answer; otherwise "field_type", "media" or "server_tools"."""
    match endpoint:
        case "completions":
            return None
        case "chat":
            return _each(body.get("messages"), lambda message: _contents(message, _is_whole_part))
        case "responses":
            metadata = body.get("metadata")
            if isinstance(metadata, dict) and not all(isinstance(value, str) for value in metadata.values()):
                return "field_type"
            return _responses(body)
        case "messages":
            system = _contents({"content": body.get("system")}, _is_whole_block)
            return system or _each(body.get("messages"), lambda message: _contents(message, _is_whole_block))
        case "embeddings":
            return None if _is_texts(body.get("input")) else "field_type"
        case "rerank" | "score":
            return None if all(_is_texts(body[name]) for name in _TEXTS if name in body) else "media"


def _each(values: object, why_not: Callable[[object], str | None]) -> str | None:
    if values is None:
        return None
    if not isinstance(values, list):
        return "field_type"
    return next((why for value in values if (why := why_not(value)) is not None), None)


def _contents(message: object, is_whole: Callable[[Mapping[str, object]], bool]) -> str | None:
    if not isinstance(message, dict):
        return "field_type"
    content = message.get("content")
    if content is None or isinstance(content, str):
        return None
    if not isinstance(content, list):
        return "field_type"
    whole = all(isinstance(part, str) or (isinstance(part, dict) and is_whole(part)) for part in content)
    return None if whole else "media"


def _is_whole_part(part: Mapping[str, object]) -> bool:
    """Of a chat message (a uuid names what vLLM has read before)."""
    kind = part.get("type")
    if not isinstance(kind, str):
        return False
    if kind in _TEXT_PARTS:
        return not part.keys() & {"uuid", *_URL_PARTS}
    if kind == "input_audio":
        return "uuid" not in part
    if kind not in _URL_PARTS or part.keys() - {"type", "detail", kind}:
        return False
    source = part.get(kind)
    return _is_data(source.get("url") if isinstance(source, dict) and not source.keys() - {"url", "detail"} else source)


def _responses(body: Mapping[str, object]) -> str | None:
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        return "field_type"
    if any(not isinstance(tool, dict) or tool.get("type") not in _OWN_TOOLS for tool in tools):
        return "server_tools"
    given = body.get("input")
    return None if isinstance(given, str) else _each(given, _item)


def _item(item: object) -> str | None:
    if not isinstance(item, dict):
        return "field_type"
    if item.get("type", "message") not in _ITEMS:
        return "media"  # an item_reference, a file, the result of a server's tool
    for name in ("content", "output", "summary"):
        if (why := _contents({"content": item.get(name)}, _is_whole_input)) is not None:
            return why
    return None


def _is_whole_input(part: Mapping[str, object]) -> bool:
    kind = part.get("type")
    if kind in _TEXT_PARTS:
        return not part.keys() & {"uuid", *_URL_PARTS}
    return (
        kind == "input_image" and not part.keys() - {"type", "detail", "image_url"} and _is_data(part.get("image_url"))
    )


def _is_whole_block(block: Mapping[str, object]) -> bool:
    """Of a message to Anthropic's API."""
    kind = block.get("type")
    if kind == "image":
        source = block.get("source")
        return isinstance(source, dict) and source.get("type") == "base64"
    if kind == "tool_result":
        return _contents(block, _is_whole_block) is None
    return kind in _BLOCKS


def _is_data(url: object) -> bool:
    return isinstance(url, str) and url.startswith("data:")


def _is_texts(value: object) -> bool:
    """A text, tokens, or a list of one of them."""
    if isinstance(value, str):
        return True
    if not isinstance(value, list):
        return False
    return all(isinstance(each, str | int) or (isinstance(each, list) and _is_tokens(each)) for each in value)


def _is_tokens(value: list[object]) -> bool:
    return all(type(token) is int for token in value)
