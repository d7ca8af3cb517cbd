"""A response cache in front of a real server on real sockets, over frames shaped like vLLM's; for the tests of both."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import uvicorn
from nacl.signing import SigningKey
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hyperspace_vllm.api.middleware import ResponseCacheMiddleware
from hyperspace_vllm.api.options import ApiMessage, ResponseCacheOptions
from hyperspace_vllm.core.local.claim_messages import ClaimRequest, RequestDone
from hyperspace_vllm.core.local.messages import NodeMessage
from hyperspace_vllm.core.local.response_cache_messages import (
    FindResponse,
    PurgeResponses,
    ReleaseResponse,
    ResponseAudited,
    TouchResponses,
)
from hyperspace_vllm.core.local.similar_messages import FindSimilar, RememberQuestion, SimilarChecked
from hyperspace_vllm.core.records.ids import network_id
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS
from hyperspace_vllm.core.response.similar.canonical import ACRONYMS
from hyperspace_vllm.daemon.local.request_leases import RequestLeases
from hyperspace_vllm.daemon.responses.embedding import load_embedder
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.daemon.responses.similar import SimilarQuestions
from tests.support.inbox import Hear, Inbox
from tests.support.until import until_async

CHAT = {"model": "base", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
TEXT = {"model": "base", "prompt": "Once"}
STREAM = {"stream": True}
USAGE = {"stream_options": {"include_usage": True}}
UNLIMITED = httpx.Limits(max_connections=None)
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"


def open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


@dataclass
class Upstream:
    """Takes the place of vLLM's routes, and answers each computation differently.

    A stream's start is sent at once; `first` is before its first frame, `gate` before the second and before JSON.
    """

    bodies: list[bytes] = field(default_factory=list)
    first: asyncio.Event = field(default_factory=open_gate)
    gate: asyncio.Event = field(default_factory=open_gate)
    streaming: int = 0
    disconnects: int = 0
    frames_sent: int = 0
    failures: list[str] = field(default_factory=list)  # how the next computations fail
    words: int = 3
    says: list[str] = field(default_factory=list)  # the text of the next computations
    filler: str = ""

    async def answer(self, request: Request) -> Response:
        raw = await request.body()
        self.bodies.append(raw)
        number = len(self.bodies)
        failure = self.failures.pop(0) if self.failures else ""
        try:
            body = json.loads(raw)
        except ValueError:
            return JSONResponse({"error": {"message": "bad JSON", "code": 400}}, 400)
        if failure == "refuse":
            return JSONResponse({"error": {"message": "overloaded", "code": 503}}, 503)
        if failure == "stall":
            await self._until_disconnect(request, asyncio.Event())
        if body.get("stream"):
            frames = self._frames(body, number, failure, self._id(request, body, number), _is_chat(request))
            return StreamingResponse(frames, media_type="text/event-stream")
        if not await self._until_disconnect(request, self.gate):
            return Response(status_code=499)
        if failure == "raise":
            raise RuntimeError("engine died")
        return JSONResponse(self._answer(number, self._id(request, body, number), _is_chat(request)))

    async def _until_disconnect(self, request: Request, gate: asyncio.Event) -> bool:
        gone = asyncio.ensure_future(request.receive())
        opened = asyncio.create_task(gate.wait())
        await asyncio.wait((gone, opened), return_when=asyncio.FIRST_COMPLETED)
        self.disconnects += not gate.is_set()
        for task in (gone, opened):
            task.cancel()
        return gate.is_set()

    def _text(self, number: int) -> list[str]:
        return [self.says.pop(0)] if self.says else [f"w{number}.{at}{self.filler} " for at in range(self.words)]

    def _id(self, request: Request, body: dict[str, Any], number: int) -> str:
        """The id that vLLM makes of the client's request id."""
        named = request.headers.get("x-request-id", body.get("request_id"))
        return f"id-{number}" if named is None else f"{'chatcmpl' if _is_chat(request) else 'cmpl'}-{named}"

    def _answer(self, number: int, answer_id: str, chat: bool) -> dict[str, Any]:
        text = "".join(self._text(number))
        shape = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {
            "id": answer_id,
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": "base",
            "choices": [{"index": 0, **shape, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
            "system_fingerprint": "fp",
            "usage": self._usage(),
            "kv_transfer_params": None,
        }

    def _usage(self) -> dict[str, int]:
        return {"prompt_tokens": 5, "total_tokens": 5 + self.words, "completion_tokens": self.words}

    async def _frames(
        self, body: dict[str, Any], number: int, failure: str, answer_id: str, chat: bool
    ) -> AsyncIterator[str]:
        usage = (body.get("stream_options") or {}).get("include_usage")
        finished = False

        def frame(shape: dict[str, Any] | None, finish: str | None = None, **more: object) -> str:
            choices = [] if shape is None else [{"index": 0, **shape, "logprobs": None, "finish_reason": finish}]
            kind = "chat.completion.chunk" if chat else "text_completion"
            head = {"id": answer_id, "object": kind, "created": 1, "model": "base", "choices": choices}
            self.frames_sent += 1
            return f"data: {json.dumps(head | more, separators=(',', ':'))}\n\n"

        try:
            self.streaming += 1
            await self.first.wait()
            if failure == "error frame":
                yield 'data: {"error":{"message":"engine error","code":500}}\n\n'
                yield "data: [DONE]\n\n"
                finished = True
                return
            if chat:
                yield frame({"delta": {"role": "assistant", "content": ""}})
            for at, word in enumerate(self._text(number)):
                if at == 1:
                    await self.gate.wait()
                    if failure == "raise":
                        raise RuntimeError("engine died")
                yield frame({"delta": {"content": word}} if chat else {"text": word})
            last = {"delta": {"content": ""}} if chat else {"text": ""}
            yield frame(last, "stop", **({} if usage else {"system_fingerprint": "fp"}))
            if usage:
                yield frame(None, usage=self._usage(), system_fingerprint="fp")
            yield "data: [DONE]\n\n"
            finished = True
        finally:
            self.disconnects += not finished


def _is_chat(request: Request) -> bool:
    return request.url.path.endswith("chat/completions")


class Others(Protocol):
    """A node's answers about other nodes' responses, which it puts into its `inbox`."""

    def find(self, node: "Node", asked: FindResponse) -> None:
        """A lookup begins."""


@dataclass
class Node:
    """The real store, without the socket in between; `others` None: it takes no lookups."""

    store: ResponseStore
    connected: bool = True
    keeps: bool = True
    epoch: int = 1
    others: Others | None = None
    similar: SimilarQuestions | None = None
    scopes: list[str] = field(default_factory=list)
    asked: list[FindResponse] = field(default_factory=list)
    leases: RequestLeases = field(default_factory=lambda: RequestLeases(lambda route, message: False))
    route: bytes = b"api"
    api_servers: int = 1
    compared: list[FindSimilar] = field(default_factory=list)
    checked: list[SimilarChecked] = field(default_factory=list)
    audited: list[ResponseAudited] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    sent: list[ApiMessage] = field(default_factory=list)
    inbox: Inbox = field(default_factory=Inbox)

    def send(self, message: ApiMessage) -> bool:
        self.sent.append(message)
        match message:
            case TouchResponses(keys):
                self.store.touch(keys)
                return True
            case FindSimilar():
                self.compared.append(message)
                if self.similar is None or not self.connected:
                    return False
                loop = asyncio.get_running_loop()
                self.similar.find(message, lambda found: self._later(loop, found))
                return True
            case SimilarChecked():
                self.checked.append(message)
                if self.similar is not None:
                    self.similar.check(message)
                return True
            case RememberQuestion():
                if self.similar is not None:
                    self.similar.remember_question(message)
                return True
            case FindResponse():
                if self.others is None or not self.connected:
                    return False
                self.asked.append(message)
                self.others.find(self, message)
                return True
            case ClaimRequest():
                self.leases.claim(self.route, message)
                return True
            case RequestDone(key):
                self.leases.over(self.route, key)
                return True
            case ReleaseResponse(lookup):
                self.released.append(lookup)
                return True
            case PurgeResponses(keys):
                self.store.purge(keys)
                return True
            case ResponseAudited():
                self.audited.append(message)
                return True
        self.scopes.append(message.scope)
        if not self.connected or not self.keeps:
            return self.connected
        if self.similar is not None and message.question is not None:
            self.similar.remember(message)
            return True
        return self.store.store(message)

    def _later(self, loop: asyncio.AbstractEventLoop, message: NodeMessage) -> None:
        loop.call_soon_threadsafe(lambda: self.inbox.append(message))

    def receive(self) -> list[NodeMessage]:
        return self.inbox.take()

    def listen(self, hear: Hear) -> None:
        self.inbox.listen(hear)


@dataclass(frozen=True)
class Signer:
    signing_key: SigningKey = field(default_factory=lambda: SigningKey(bytes(32)))


class Requests:
    """An ASGI application that counts what it is asked and has not ended yet."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1


@dataclass
class Bench:
    """One server with a cache, its upstream, its node, and a client."""

    upstream: Upstream
    node: Node
    client: httpx.AsyncClient
    cache: ResponseCacheMiddleware
    port: int
    requests: Requests

    async def ask(self, body: object, path: str = CHAT_PATH, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(path, json=body, headers=named)

    async def stored(self, count: int) -> None:
        await until_async(lambda: self.node.store.stats()["stored"] >= count)


until = until_async  # test_network_race.py, which is being split, imports it from here
MakeBench = Callable[..., Awaitable[Bench]]
Answer = Callable[[Request], Awaitable[Response]]


@asynccontextmanager
async def benches(tmp_path: Path) -> AsyncIterator[MakeBench]:
    """Makes servers that share a database; they end together."""
    async with AsyncExitStack() as stack:

        async def make(
            outside: list[Middleware] | None = None, more_routes: dict[str, Answer] | None = None, **options: Any
        ) -> Bench:
            path = tmp_path / "responses.sqlite"
            node = Node(ResponseStore(path, 1 << 30, RESPONSE_TTL_MS, Signer(), network_id("test")))
            node.store.start()
            stack.callback(node.store.close)
            if options.get("semantic", "off") != "off":
                node.similar = SimilarQuestions(path, load_embedder, ACRONYMS, node.store)
                stack.callback(node.similar.close)
                similar = node.similar
                await until_async(lambda: similar.stats()["state"] == "on")
            upstream = Upstream()
            defaults: dict[str, Any] = {
                "db_path": path,
                "model_digest": lambda: bytes(32),
                "client": node,
                "served_models": frozenset({"base"}),
                "fleet_secret": b"fleet",
                "process_secret": b"process",
                "engine_version": "vllm 0.32.0",
                "read_deadline_s": 5.0,  # not under test, and the machine may be busy
                "body_deadline_s": 60.0,
            }
            caches: list[ResponseCacheMiddleware] = []

            def cached(app: Any) -> ResponseCacheMiddleware:
                caches.append(ResponseCacheMiddleware(app, ResponseCacheOptions(**(defaults | options))))
                return caches[-1]

            routes = [Route(path, upstream.answer, methods=["POST"]) for path in (CHAT_PATH, TEXT_PATH)]
            routes += [Route(path, answer, methods=["POST"]) for path, answer in (more_routes or {}).items()]
            app = Starlette(routes=routes, middleware=[*(outside or []), Middleware(cached)])
            app.middleware_stack = app.build_middleware_stack()
            requests = Requests(app)
            port = await stack.enter_async_context(served(requests))
            client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, limits=UNLIMITED)
            await stack.enter_async_context(client)
            return Bench(upstream, node, client, caches[0], port, requests)

        yield make


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    running = asyncio.create_task(server.serve())
    await until_async(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    await running


def data_of(response: httpx.Response) -> list[Any]:
    """The JSON of each frame of a stream that ended with [DONE]."""
    *frames, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def said(response: httpx.Response) -> dict[str, Any]:
    """A JSON answer without its id, which differs for each client."""
    return {name: value for name, value in response.json().items() if name != "id"}


def text_of(response: httpx.Response) -> str:
    if response.headers["content-type"] == "application/json":
        (choice,) = response.json()["choices"]
        text: str = choice["message"]["content"] if "message" in choice else choice["text"]
        return text
    choices = [choice for chunk in data_of(response) for choice in chunk["choices"]]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)
