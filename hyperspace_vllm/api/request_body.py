"""Reading a request's body, and passing it on to the application with a few changes."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Message, Receive, Scope

from ..core.records.limits import REQUEST_BYTES_MAX


async def read_body(receive: Receive) -> bytes | list[Message]:
    """The whole body; or, if it is too long or its client left, the messages received so far."""
    messages: list[Message] = []
    size = 0
    while True:
        message = await receive()
        messages.append(message)
        size += len(message.get("body", b""))
        if message["type"] != "http.request" or size > REQUEST_BYTES_MAX:
            return messages
        if not message.get("more_body", False):
            return (
                bytes(messages[0].get("body", b""))
                if len(messages) == 1
                else b"".join(message.get("body", b"") for message in messages)
            )


async def read_rest(messages: list[Message], receive: Receive) -> bytes | list[Message]:
    """The whole body that `read_body` found too long; the messages if the client left."""
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    if messages[-1]["type"] != "http.request":
        return messages
    return b"".join(message.get("body", b"") for message in messages)


def replayed(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that returns `messages` again, and then the others."""
    again = list(reversed(messages))

    async def receive_again() -> Message:
        return again.pop() if again else await receive()

    return receive_again


def rewritten(
    raw: bytes, body: Mapping[str, Any], signed_scope: Mapping[str, str] | None, salt: object, add_usage: bool
) -> bytes:
    """The body for the application, with `changes_of` put in; the arguments are theirs."""
    return with_changes(raw, body, changes_of(body, signed_scope, salt, add_usage))


def changes_of(
    body: Mapping[str, Any], signed_scope: Mapping[str, str] | None, salt: object, add_usage: bool
) -> dict[str, Any]:
    """The fields that are changed for the application: a scope, another salt, a request for usage.

    A client's own kv_transfer_params.hyperspace is removed in any case.
    """
    changes: dict[str, Any] = {}
    params = body.get("kv_transfer_params")
    if params is None or isinstance(params, dict):
        others = {name: value for name, value in (params or {}).items() if name != "hyperspace"}
        if signed_scope is not None:
            changes["kv_transfer_params"] = {**others, "hyperspace": signed_scope}
        elif params and "hyperspace" in params:
            changes["kv_transfer_params"] = others or None
    if salt != body.get("cache_salt"):
        changes["cache_salt"] = salt
    if add_usage:
        changes["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return changes


def with_changes(raw: bytes, body: Mapping[str, Any], changes: Mapping[str, Any]) -> bytes:
    """The JSON of `body`, which is `raw`, with other values for some fields."""
    if not changes:
        return raw
    if changes.keys() & body.keys() or not body or raw.lstrip()[:1] != b"{" or b"\0" in raw[:4]:
        try:
            return json.dumps({**body, **changes}).encode()
        except RecursionError:  # a client's own scope may stay: its signature does not verify
            return raw
    # New members only: spliced in at the end, a long prompt need not be written out again.
    return raw.rstrip()[:-1] + b"," + json.dumps(changes).encode()[1:]


def with_content_length(scope: Scope, length: int) -> Scope:
    """The scope of a request, or the start of a response, whose body now has another length."""
    headers = [
        (name, str(length).encode() if name.lower() == b"content-length" else value) for name, value in scope["headers"]
    ]
    return {**scope, "headers": headers}
