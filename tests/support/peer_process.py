"""A node in a separate process, for tests that stop it.

`python -m tests.support.peer_process DIRECTORY PEER SEGMENTS BYTES`

Stages and encodes SEGMENTS rows of BYTES under the keys of "process", prints its address, then serves until stdin ends.
"""

import asyncio
import sys
from pathlib import Path

from hyperspace_vllm.core.records.layout import Layout, Part
from hyperspace_vllm.core.records.limits import GiB
from tests.support.nodes import TestNode, keys
from tests.support.until import until_async


def layout_of(row_bytes: int) -> Layout:
    """One full-attention part on one rank."""
    return Layout(bytes(32), 256, (Part(0, row_bytes),), 1)


async def main(directory: Path, peer: str, segments: int, row_bytes: int) -> None:
    """See the module."""
    node = TestNode(directory, (peer,), arena_bytes=GiB // 4)
    node.stage(keys("process", segments), layout_of(row_bytes))
    await until_async(lambda: node.store.rows == segments)
    print(node.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await node.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
