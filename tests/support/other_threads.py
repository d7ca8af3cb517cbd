"""Whether a call releases the GIL."""

import threading
import time
from collections.abc import Callable


def run_during(call: Callable[[], object]) -> bool:
    """Whether another thread ran during `call`, which should take 5 ms or more."""
    stamps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.0005):
            stamps.append(time.perf_counter())

    def seen() -> bool:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        # Once or twice could be just before or just after the code that holds the GIL.
        return sum(start < stamp < end for stamp in list(stamps)) >= 5

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        return any(seen() for _ in range(50))  # a busy machine may run only this process for a while
    finally:
        stop.set()
        thread.join()
