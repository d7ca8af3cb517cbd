"""Other nodes and the engine, whichever answers first: an ASGI application around vLLM's, for one computation.

With a hint the request waits for the other nodes until the lookup's deadline, or until the node withdraws the hint, and
the engine starts only after that. Without one the engine starts at once, and the first body frame wins: the engine's
start of the response is held back until then, its body never. The loser is cancelled: the lookup is released, and the
engine sees a client's disconnect.

It runs inside a flight, so all clients that wait for the same computation get the winner's answer, and the race sees a
disconnect when all of them have left.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..contained import report_error
from ..core.local.response_cache_messages import ResponseFound
from .coalesce import ABANDONED_GRACE_S, drops_silently
from .node_lookup import Pending
from .stored_answer import Sending, StoredAnswer

Outcome = Literal[
    "waited_hit",  # hinted (or only-if-cached), and found
    "waited_miss",
    "network_won",
    "engine_won",
    "not_found",  # the other nodes had nothing, before the engine's first frame
    "unusable",  # found, but not what its proof states, or not what the client wants
    "left",  # the last client went before anything was decided
]
HITS: tuple[Outcome, ...] = ("waited_hit", "network_won")


class NetworkRace:
    """Runs once. `find` makes the answer from the found response (None: not usable).

    `decided` is called exactly once, before anything of the answer is sent; `outcome` is None until then.
    `waits`: as if there were a hint; `answer` is then the other nodes' answer, which is not sent.
    """

    def __init__(
        self,
        engine: ASGIApp,
        lookup: Pending,
        find: Callable[[ResponseFound], Awaitable[StoredAnswer | None]],
        decided: Callable[[Outcome], None],
        sending: Sending,
        waits: bool = False,
    ) -> None:
        self._engine = engine
        self._lookup = lookup
        self._find = find
        self._decided = decided
        self._sending = sending
        self._waits = waits
        self.outcome: Outcome | None = None
        self.answer: StoredAnswer | None = None
        self._held: Message | None = None  # the engine's start
        self._gone = asyncio.Event()  # no client waits for the engine any more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whose body comes in one message."""
        requests = [await receive()]
        watcher = asyncio.create_task(self._watch(receive), name="hyperspace-race-disconnect")

        async def receive_for_engine() -> Message:
            if requests:
                return requests.pop()
            await self._gone.wait()
            return {"type": "http.disconnect"}

        try:
            if self._waits or await self._lookup.hint:
                await self._wait(send)
            if not self._gone.is_set():
                self._lookup.race()
                await self._race(scope, receive_for_engine, send)
        finally:
            watcher.cancel()
            self._decide("left")
            self._lookup.release()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._decide("left")
        self._gone.set()
        self._lookup.release()

    async def _wait(self, send: Send) -> None:
        """Send the lookup's response; if it is not usable, the engine answers, and if the hint is withdrawn, race."""
        if not self._waits:
            await asyncio.wait((self._lookup.answer, self._lookup.withdrawn), return_when=asyncio.FIRST_COMPLETED)
            if not self._lookup.answer.done():
                return
        found = await self._lookup.answer
        answer = await self._find(found) if found is not None and not self._gone.is_set() else None
        if self._gone.is_set():
            return
        if answer is None:
            self._decide("waited_miss" if found is None else "unusable")
            return
        self._decide("waited_hit")
        self._gone.set()
        if self._waits:
            self.answer = answer
        else:
            await self._send_all(answer, send)

    async def _race(self, scope: Scope, receive: Receive, send: Send) -> None:
        silent = drops_silently(scope)

        async def send_from_engine(message: Message) -> None:
            if self.outcome in HITS:
                if not silent:
                    raise OSError("client disconnected")
            elif self.outcome is None and message["type"] == "http.response.start":
                self._held = message
            else:
                self._decide("engine_won")
                self._lookup.release()
                await self._let_start(send)
                await send(message)

        patience = asyncio.timeout(None)
        replay = asyncio.create_task(self._replay(send, patience), name="hyperspace-network-replay")
        try:
            async with patience:
                await self._engine(scope, receive, send_from_engine)
        except Exception as error:
            if self.outcome not in HITS:
                raise
            # Its client has gone, it was told: that is an OSError, or what Starlette makes of one.
            if not isinstance(error, OSError) and not isinstance(error.__context__, OSError):
                report_error("a computation whose request another node has answered")
        finally:
            if self.outcome not in HITS:
                replay.cancel()
        if self.outcome in HITS:
            await replay
        else:
            await self._let_start(send)

    async def _replay(self, send: Send, patience: asyncio.Timeout) -> None:
        """Answer with the lookup's response, if it comes before the engine's first frame."""
        found = await self._lookup.answer
        if self.outcome is not None:
            return
        answer = None if found is None else await self._find(found)
        if self.outcome is not None:  # the engine was quicker
            return
        if answer is None:
            self._decide("not_found" if found is None else "unusable")
            await self._let_start(send)
            return
        self._decide("network_won")
        self._gone.set()
        patience.reschedule(asyncio.get_running_loop().time() + ABANDONED_GRACE_S)
        await self._send_all(answer, send)

    async def _let_start(self, send: Send) -> None:
        held, self._held = self._held, None
        if held is not None:
            await send(held)

    def _decide(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._decided(outcome)

    async def _send_all(self, answer: StoredAnswer, send: Send) -> None:
        with suppress(OSError):  # its clients have gone
            for message in answer.whole(self._sending):
                await send(message)
