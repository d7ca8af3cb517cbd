"""The size of an arena when `arena_bytes` doesn't set it: a few prompts of the model, within a share of the machine.

A server's main process knows the model before it starts the node, and estimates what its longest prompt takes. A node
that is started on its own knows no model and takes a share of the memory.
"""

import contextlib
import os
from pathlib import Path

from .core.records.limits import GiB, MiB

PROMPTS = 4  # of the longest: one being served, one being written, and those that may be requested next
MEMORY_SHARE = 8  # at most an eighth of the memory, half of that for a node on its own
LEAST_BYTES = GiB  # for small models, unless that is more than the share
MOST_BYTES = 32 * GiB  # a node reserves it at its start, at some GiB a second
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def arena_bytes(prompt_bytes: int | None, memory_bytes: int) -> int:
    """Bytes of an arena on a machine of `memory_bytes`; `prompt_bytes`: KV of the longest prompt, None if unknown."""
    share = memory_bytes // MEMORY_SHARE
    wanted = share // 2 if prompt_bytes is None else PROMPTS * prompt_bytes
    return max(min(max(wanted, LEAST_BYTES), share, MOST_BYTES), MiB)


def memory_bytes() -> int:
    """The most memory that this process may use: the machine's, or its container's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        limits.append(int(_CGROUP_LIMIT.read_text()))
    return min(limits)
