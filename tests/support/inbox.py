"""What a scripted node has said: its listener hears it in the loop's next turn, as of a real one."""

import asyncio
from collections.abc import Callable, Iterable

from hyperspace_vllm.core.local.messages import NodeMessage

Hear = Callable[[list[NodeMessage]], None]


class Inbox(list[NodeMessage]):
    """Messages on their way; `takes` counts how often its client took them, or found none."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = 0
        self._hear: Hear | None = None

    def listen(self, hear: Hear) -> None:
        self._hear = hear
        self._loop = asyncio.get_running_loop()

    def take(self) -> list[NodeMessage]:
        self.takes += 1
        messages = self[:]
        self.clear()
        return messages

    def tell(self) -> None:
        """There is something to take, or the session has changed."""
        if self._hear is not None:
            self._loop.call_soon(lambda hear: hear(self.take()), self._hear)

    def append(self, message: NodeMessage) -> None:
        super().append(message)
        self.tell()

    def extend(self, messages: Iterable[NodeMessage]) -> None:
        super().extend(messages)
        self.tell()

    def __iadd__(self, messages: Iterable[NodeMessage]) -> "Inbox":  # type: ignore[override,misc]
        self.extend(messages)
        return self
