"""Every endpoint of a real server asked by its official client, and what is compared of the answers."""

from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import httpx2
import openai

from bench.servers import Server

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
STATUS: list[str] = []  # Cache-Status of every answer, the latest last


def note(response: Any) -> None:
    STATUS.append(response.headers["cache-status"])


def openai_client(server: Server) -> openai.OpenAI:
    http: Any = httpx.Client(event_hooks={"response": [note]}, timeout=120)  # of whichever httpx openai is typed for
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", http_client=http, max_retries=0)


def anthropic_client(server: Server) -> anthropic.Anthropic:
    http = httpx2.Client(event_hooks={"response": [note]}, timeout=120)
    return anthropic.Anthropic(base_url=server.url, api_key="none", http_client=http, max_retries=0)


def chat(server: Server, stream: bool, **fields: Any) -> dict[str, Any]:
    client = openai_client(server).chat.completions
    request = {"model": "demo", "max_tokens": 12, "temperature": 0, **fields}
    if not stream:
        answer = client.create(**request).to_dict()
        return {"choices": [simplified(choice["message"], choice) for choice in answer["choices"]], **of(answer)}
    choices: dict[int, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    for chunk in client.create(**request, stream=True, stream_options={"include_usage": True}):
        last = {**last, **{name: value for name, value in chunk.to_dict().items() if value is not None}}
        for choice in chunk.to_dict()["choices"]:
            into = choices.setdefault(choice["index"], {"message": {}, "logprobs": None})
            for name in ("content", "reasoning"):
                if choice["delta"].get(name) is not None:
                    into["message"][name] = into["message"].get(name, "") + choice["delta"][name]
            if choice.get("logprobs"):
                before = (into["logprobs"] or {}).get("content", [])
                into["logprobs"] = {"content": [*before, *choice["logprobs"]["content"]]}
            for name in ("finish_reason", "stop_reason"):
                into[name] = choice.get(name) or into.get(name)
    return {"choices": [simplified(c["message"], c) for _, c in sorted(choices.items())], **of(last)}


def simplified(message: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    logprobs = choice.get("logprobs")
    return {
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning") or "",
        "tokens": None if logprobs is None else [(e["token"], e["logprob"]) for e in logprobs["content"]],
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice.get("stop_reason"),
    }


def of(answer: dict[str, Any]) -> dict[str, Any]:
    usage = {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {"id": answer["id"], "created": answer["created"], "model": answer["model"], "usage": usage}


def completion(server: Server, stream: bool, **fields: Any) -> dict[str, Any]:
    client = openai_client(server).completions
    request = {"model": "demo", "max_tokens": 12, "temperature": 0, **fields}
    if not stream:
        answer = client.create(**request).to_dict()
        whole = {choice["index"]: (choice["text"], choice["finish_reason"]) for choice in answer["choices"]}
        return {"texts": whole, **of(answer)}
    texts: dict[int, tuple[str, str | None]] = {}
    last: dict[str, Any] = {}
    for chunk in client.create(**request, stream=True, stream_options={"include_usage": True}):
        last = {**last, **{name: value for name, value in chunk.to_dict().items() if value is not None}}
        for choice in chunk.choices:
            before, finish = texts.get(choice.index, ("", None))
            texts[choice.index] = before + choice.text, choice.finish_reason or finish
    return {"texts": texts, **of(last)}


def response(server: Server, stream: bool, **fields: Any) -> dict[str, Any]:
    client = openai_client(server).responses
    request = {"model": "demo", "max_output_tokens": 12, "temperature": 0, **fields}
    if not stream:
        whole: dict[str, Any] = client.create(**request).to_dict()
        return whole
    text, last = "", None
    for event in client.create(**request, stream=True):
        last = event
        text += event.delta if event.type in ("response.output_text.delta", "response.reasoning_text.delta") else ""
    assert last is not None
    assert last.type == "response.completed"
    final: dict[str, Any] = last.response.to_dict()
    assert text == "".join(part["text"] for item in final["output"] for part in item.get("content") or ())
    return final


def message(server: Server, stream: bool, **fields: Any) -> dict[str, Any]:
    client = anthropic_client(server).messages
    sampling = {"temperature": 0, **fields.get("extra_body", {})}  # the client no longer has a parameter for it
    request = {"model": "demo", "max_tokens": 12, **fields, "extra_body": sampling}
    if not stream:
        answer = client.create(**request).to_dict()
    else:
        with client.stream(**request) as events:
            answer = events.get_final_message().to_dict()
    return {name: value for name, value in answer.items() if value is not None}


def unstreamed(server: Server, _: bool, **fields: Any) -> dict[str, Any]:
    """This model reasons without end: without its reasoning a stream is empty, and isn't stored."""
    return chat(server, False, **fields)


Ask = Callable[..., dict[str, Any]]
