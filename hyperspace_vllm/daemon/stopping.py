"""SIGTERM and SIGINT end a node within STOP_S, also while it starts, stops or hangs.

Python runs its signal handlers in the main thread between two instructions, so a call that hangs would block them. The
interpreter's own handler writes to a pipe at once; a thread reads the pipe and sets the deadline.
"""

import asyncio
import faulthandler
import os
import signal
import threading
from contextlib import suppress
from types import FrameType

STOP_S = 8.0  # Docker waits 10 s before it kills


class Stopping:
    """Created in the main thread, first of all: the first process of a container ignores signals by default."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._requested = asyncio.Event()
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(told,), name="hyperspace-stop", daemon=True).start()

    def attach(self) -> None:
        """On the running loop: from here on a signal interrupts nothing, `requested` returns instead."""
        self._loop = asyncio.get_running_loop()

    async def requested(self) -> None:
        """Return when a signal asks the node to stop."""
        await self._requested.wait()

    def set_deadline(self) -> None:
        """From now the process has STOP_S left, then ends with status 1 and the stacks of its threads."""
        faulthandler.dump_traceback_later(STOP_S, exit=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._loop is None:
            raise SystemExit(0)  # nothing is built yet
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._requested.set)

    def _watch(self, told: int) -> None:
        while os.read(told, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
            pass
        self.set_deadline()
