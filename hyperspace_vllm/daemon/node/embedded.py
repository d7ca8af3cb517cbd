"""An embedded node and its starter: how long it waits for clients, when it leaves, and what it tells.

Standard input and standard error are pipes to the starter (node_process.py), or the null device.
"""

import asyncio
import logging
import os
import select
import stat
import time
from contextlib import suppress

from ...client import NodeClient
from ...config import Config
from ...core.records.limits import EMBEDDED_LINGER_MS
from ..local.local_server import LocalServer
from .directory import lock_directory

logger = logging.getLogger(__name__)

_NOBODY_CAME_S = 120.0
_STARTER_COMES_S = 3600.0  # a large model loads for that long before its engine attaches
_LOOK_S = 0.25
_ANSWER_S = 6.0  # a node that has just taken the lock answers within 2 s


async def until_unwanted(server: LocalServer) -> None:
    """Return when an embedded node's last client has been gone for a while, or nobody ever came."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _patience_s()
    orphaned = asyncio.Event()
    if _has_starter():
        loop.add_reader(0, lambda: orphaned.set() if _starter_is_dead() else None)
    came = False
    while loop.time() < deadline and (came or not orphaned.is_set()):
        await asyncio.sleep(_LOOK_S)
        if orphaned.is_set():
            loop.remove_reader(0)
        if server.engine_leases or (server.had_engine and not came):
            came = True
            deadline = loop.time() + EMBEDDED_LINGER_MS / 1000
    logger.info("nobody needs this node any more")


def wait_in_line(config: Config) -> int | None:
    """Hold a lease for the server that started us until it can hold its own; the lock, if the node leaves first.

    A server that is restarted finds the node of its predecessor about to leave, and needs minutes to load its model
    before it attaches. Without this it would run without a node for the rest of its life.
    """
    if not _has_starter():
        say_all_is_well()
        return None
    client = NodeClient(config, "api", f"starter-{os.getpid()}")
    began = time.monotonic()
    heard = False
    try:
        while (waited_s := time.monotonic() - began) < _patience_s():
            if not heard and client.wait_connected(0):
                heard = True
                say_all_is_well()
            elif not heard and waited_s > _ANSWER_S:
                heard = True
                logger.error(
                    "another process holds %s, but no node answers there: it is frozen, or runs on another host or for "
                    "another user; if it doesn't come back, stop it or choose another HYPERSPACE_DATA_DIR",
                    config.data_dir / "node.lock",
                )
            if (lock := lock_directory(config.data_dir)) is not None:
                return lock
            if select.select([0], [], [], _LOOK_S)[0] and _starter_is_dead():
                return None
        return None
    finally:
        client.close()


def say_all_is_well() -> None:
    """An empty line: the starter waits for the first one."""
    with suppress(OSError):  # the starter is dead
        os.write(2, b"\n")


def _has_starter() -> bool:
    """Is standard input the pipe from `start_node`? It closes when everybody who could have come is dead."""
    return stat.S_ISFIFO(os.fstat(0).st_mode)


def _starter_is_dead() -> bool:
    return not os.read(0, 4096)


def _patience_s() -> float:
    return _STARTER_COMES_S if _has_starter() else _NOBODY_CAME_S
