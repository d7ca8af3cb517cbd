"""A live line for slow steps: bar, seconds, current activity; plain lines without a terminal.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import get_terminal_size

FRAME_S = 0.1
BAR_CELLS = 20


class Step:
    """One slow step. `detail` is shown beside its title; `done` of `total` as a bar once `total` is known."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.detail = ""
        self.done = 0
        self.total = 0
        self.started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def line(self, width: int) -> str:
        """The live line, cut to `width` columns."""
        text = f"{bar(self.done, self.total, self.elapsed_s)} {self.elapsed_s:4.0f} s  {self.title}"
        if self.detail:
            text += f": {self.detail}"
        return text[: max(width - 1, 0)]


def bar(done: int, total: int, elapsed_s: float) -> str:
    """A bar of the work done; a moving block while the total is unknown."""
    if total > 0:
        filled = min(done, total) * BAR_CELLS // total
        return "[" + "#" * filled + "-" * (BAR_CELLS - filled) + "]"
    at = int(elapsed_s / FRAME_S) % BAR_CELLS
    return "[" + "".join("#" if (cell - at) % BAR_CELLS < 3 else "-" for cell in range(BAR_CELLS)) + "]"


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Show `title` while the body runs, and how long it took if it succeeds."""
    current = Step(title)
    live = sys.stderr.isatty()
    stop = threading.Event()

    def draw() -> None:
        while not stop.wait(FRAME_S):
            print("\r\x1b[2K" + current.line(get_terminal_size().columns), end="", file=sys.stderr, flush=True)

    painter = threading.Thread(target=draw, daemon=True)
    if live:
        painter.start()
    else:
        print(f"      ... {title}", file=sys.stderr, flush=True)
    try:
        yield current
    finally:
        if live:
            stop.set()
            painter.join()
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
    print(f"{current.elapsed_s:5.0f} s  {current.title}", file=sys.stderr, flush=True)
