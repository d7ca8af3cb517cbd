"""Ids in answers: removed from the stored form, and made anew for every client that gets the answer.

Context: vLLM derives an answer's id from the client's name for the request, and draws random ids for tool calls, items
and signatures. Choice: the stored form has no id of its own and numbers the random ones, so that it holds nothing of
the first client; each replay gets the id that vLLM would give its request. Rejected: replaying the first client's id,
which shows its text to other clients and lets loggers drop the second answer as a duplicate. Cost: an answer with tool
calls, items or signatures is parsed for each hit.

Ids that a parser or the model derives from the conversation (`functions.add:0`) are part of the answer and stay.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .request_fields import Endpoint

Json = dict[str, Any]

ID_CHARS_MAX = 256  # of a client's name for its request: a longer name would be repeated in every frame

# The prefixes of vLLM 0.29 to 0.33; the rest of an id is random or the client's.
_PREFIXES: dict[Endpoint, str] = {
    "chat": "chatcmpl-",
    "messages": "chatcmpl-",
    "completions": "cmpl-",
    "embeddings": "embd-",
    "rerank": "score-",
    "score": "score-",
}
# vLLM's random_uuid and uuid4().hex behind a parser's prefix, and Mistral's nine characters.
_RANDOM = re.compile(r"((?:[a-z0-9]{1,16}[-_]){0,3})([0-9a-f]{32}|[0-9a-f]{16})|()([0-9A-Za-z]{9})")


def named_by(endpoint: Endpoint, body: Mapping[str, object], header: str | None) -> str | None:
    """The client's name for its request: the body's for Responses, otherwise the `X-Request-Id` if there is one."""
    name = body.get("request_id")
    own = name if isinstance(name, str) and endpoint != "messages" else None
    return own if endpoint == "responses" or header is None else header


def answer_id(endpoint: Endpoint, named: str | None, fresh: str) -> str:
    """The id that vLLM gives the answer to a request; `fresh` are 16 random hex digits."""
    if endpoint == "responses":
        return f"resp_{fresh}" if named is None else named
    return _PREFIXES[endpoint] + (fresh if named is None else named)


def without_ids(answer: Json) -> Json:
    """Change an answer into its stored form: no `id`, and random ids numbered in their order."""
    answer.pop("id", None)
    numbers: dict[str, int] = {}

    def numbered(old: str, chars: int) -> str:
        return f"{numbers.setdefault(old, len(numbers) + 1):0{chars}x}"

    _renew(_nested(answer), numbered)
    return answer


def with_ids(stored: Json, own: str, fresh: Callable[[str, int], str]) -> Json:
    """Change a stored or another answer into the answer `own`. `fresh(old, n)`: n hex digits for an old id."""
    _renew(_nested(stored), fresh)
    stored.pop("id", None)
    return {"id": own, **stored}


def rename_event(event: Json, own: str, fresh: Callable[[str, int], str]) -> None:
    """As `with_ids`, for one event of any endpoint's stream."""
    for holder in (event, event.get("message"), event.get("response")):
        if isinstance(holder, dict) and "id" in holder:
            holder["id"] = own
    _renew(_nested_in_event(event), fresh)


Place = tuple[Json, str]


def _nested(answer: Json) -> Iterator[Place]:
    for choice in _objects(answer.get("choices")):
        for said in _objects([choice.get("message"), choice.get("delta")]):
            for call in _objects(said.get("tool_calls")):
                yield call, "id"
    for holder in (*_objects(answer.get("output")), *_objects(answer.get("content"))):
        yield from _of(holder)


def _nested_in_event(event: Json) -> Iterator[Place]:
    yield from _nested(event)
    yield event, "item_id"
    for holder in _objects([event.get(name) for name in ("item", "content_block", "delta")]):
        yield from _of(holder)
    for answer in _objects([event.get("response")]):
        yield from _nested(answer)


def _of(holder: Json) -> Iterator[Place]:
    for name in ("id", "call_id", "signature"):
        yield holder, name


def _objects(values: object) -> list[Json]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _renew(places: Iterator[Place], made: Callable[[str, int], str]) -> None:
    for holder, name in places:
        old = holder.get(name)
        if isinstance(old, str) and (found := _RANDOM.fullmatch(old)) is not None:
            prefix, digits = found[1] or "", found[2] or found[4]
            holder[name] = prefix + made(old, len(digits))
