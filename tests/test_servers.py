"""What the servers of tests and benches leave on the machine."""

import os
import signal
import subprocess
import sys

import pytest

from bench.servers import Server, ring_buffers

pytestmark = pytest.mark.io

# As vLLM's processes share a ring buffer. Its name is told before the tracker of the process could remove it.
SHARES = """
import sys, time
from multiprocessing.shared_memory import SharedMemory
ring = SharedMemory(create=True, size=1 << 20)
print(ring.name, flush=True)
time.sleep(600)
"""


def test_a_killed_server_leaves_no_ring_buffer_and_takes_no_other_servers() -> None:
    server, other = Server.__new__(Server), Server.__new__(Server)  # no vLLM is needed to be killed
    names = []
    for each in (server, other):
        each.process = subprocess.Popen([sys.executable, "-c", SHARES], stdout=subprocess.PIPE, start_new_session=True)
        assert each.process.stdout is not None
        names.append(each.process.stdout.readline().decode().strip())
    own, others = (ring_buffers(each.process.pid) for each in (server, other))
    try:
        assert [path.name for path in (*own, *others)] == names
        server.signal_group(signal.SIGKILL)
        assert not any(path.exists() for path in own)
        assert all(path.exists() for path in others)
    finally:
        for each in (server, other):
            each.signal_group(signal.SIGKILL)
            each.process.communicate()
    assert not any(os.path.exists(f"/dev/shm/{name}") for name in names)
