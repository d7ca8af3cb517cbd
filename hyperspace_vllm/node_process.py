"""Starts the process of an embedded node, and copies the node's errors to this process's log.

The node is not a descendant of the process that starts it: vLLM kills engines and servers that don't end in time with
all their descendants, and the node may serve others. Its standard error is a pipe to the process that started it. Each
line there is an error of the node; an empty line means that all is well.
"""

import fcntl
import json
import logging
import os
import select
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from .config import Config
from .core.records.errors import printable
from .regular_files import open_regular, read_regular

logger = logging.getLogger(__name__)

_SILENT_S = 8.0  # a node starts in 2 s
_LINE_BYTES_MAX = 2048
_CARD_BYTES_MAX = 65_536
_LINES_MAX = 100  # different ones
_AS_ORPHAN = "import os, sys; os.fork() or os.execv(sys.argv[1], sys.argv[1:])"


def start_node(config: Config) -> None:
    """Start an embedded node for the data directory; returns at once and never raises.

    If another node holds the directory's lock, the new process only keeps that one alive until this process's engine
    has attached, and takes over if it leaves. It exits when its last client has been gone for EMBEDDED_LINGER_MS, and
    when every process that inherited this process's end of its pipe dies before any client came.
    """
    try:
        _spawn(config, subprocess.PIPE)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no thread available
        logger.error("hyperspace: no node could be started for %s: %s", config.data_dir, error)


def revive_node(config: Config) -> bool:
    """Start an embedded node again that was killed; returns whether it did. Never raises.

    A killed node's card is still there, and its directory's lock is free. A node that was stopped has removed its card,
    a frozen one holds its lock, and one that systemd or an operator started is left to them. If several processes try,
    all but one of the new nodes exit at once.
    """
    try:
        card = json.loads(read_regular(config.data_dir / "node.json", _CARD_BYTES_MAX))
        if not isinstance(card, dict) or card.get("embedded") is not True:
            return False
        with open_regular(config.data_dir / "node.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _spawn(config, subprocess.DEVNULL)
    except (OSError, RuntimeError, ValueError) as error:  # BlockingIOError: a node is there
        logger.debug("hyperspace node not started again: %s", error)
        return False
    logger.warning("hyperspace node of %s was killed: started it again", config.data_dir)
    return True


def _spawn(config: Config, stdin: int) -> None:
    # Neither our settings that `config` overrode, nor what the server passes on to its own processes.
    others = {k: v for k, v in os.environ.items() if not k.startswith(("HYPERSPACE_", "_HYPERSPACE_"))}
    command = [sys.executable, "-m", "hyperspace_vllm.cli", "node", "--embedded"]
    launcher = subprocess.Popen(
        [sys.executable, "-ISc", _AS_ORPHAN, *command],
        bufsize=0,  # the interpreter may end while the thread below reads
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # Ctrl-C on the server must not end the node of other servers. Not a separate session: the kernel would schedule
        # it as a group (sched(7), autogroup), where nice has no effect, and spinning ranks would starve it.
        process_group=0,
        env=others | config.as_environ(),
    )
    threading.Thread(target=_relay, args=(launcher, config.data_dir), name="hyperspace-node", daemon=True).start()


def _relay(launcher: "subprocess.Popen[bytes]", data_dir: Path) -> None:
    """Log the node's errors until it ends; `launcher` is its process group's first process."""
    assert launcher.stderr is not None
    launcher.wait()
    heard = select.poll()
    heard.register(launcher.stderr, select.POLLIN)
    if not heard.poll(_SILENT_S * 1000):
        logger.warning(
            "hyperspace node of %s: not started after %.0f s, nothing is cached so far: the machine is overloaded, or "
            "the directory's file system hangs",
            data_dir,
            _SILENT_S,
        )
    said: set[str] = set()
    while line := launcher.stderr.readline(_LINE_BYTES_MAX):
        text = printable(line.decode("utf-8", "replace").strip(), _LINE_BYTES_MAX)
        if text and text not in said and len(said) < _LINES_MAX:
            logger.error("hyperspace node of %s: %s", data_dir, text)
            said.add(text)
    if not said:
        logger.error("hyperspace node of %s: ended without a word; nothing is cached", data_dir)
    if launcher.stdin is not None:
        launcher.stdin.close()
    launcher.stderr.close()
    with suppress(ChildProcessError):  # an orphan is its child only where this process is a container's first one
        os.waitpid(-launcher.pid, 0)
