"""The frames between a worker process and the node, and the worker's side of them.

worker: READY once it can work, then one frame for each request; it ends with its input
frame = length u32 big-endian || a request or a reply
"""

import os
import sys

READY = b"r"
LENGTH_BYTES = 4


def framed(message: bytes) -> bytes:
    """A message as it goes through a pipe."""
    return len(message).to_bytes(LENGTH_BYTES, "big") + message


def lower_priority() -> None:
    """Run at least at the niceness that the command line names."""
    os.setpriority(os.PRIO_PROCESS, 0, max(int(sys.argv[1]), os.getpriority(os.PRIO_PROCESS, 0)))


def say_ready() -> None:
    """Tell the node that it may send the first request."""
    _write(READY)


def next_request() -> bytes | None:
    """The next request on standard input, to be answered with `reply`; None when the node has closed it."""
    source = sys.stdin.buffer
    size = int.from_bytes(source.read(LENGTH_BYTES), "big")
    request = source.read(size)
    return request if size and len(request) == size else None


def reply(message: bytes) -> None:
    """Answer a request on standard output."""
    _write(framed(message))


def _write(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os._exit(0)  # the node has ended; Python would try to flush once more what it did not take
