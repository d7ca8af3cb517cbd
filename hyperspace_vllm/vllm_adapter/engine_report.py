"""Reports the engine's load to the node once a second, with the segments that entered and left its KV cache.

It also warns, once a session, when the node's arena is too small for one of the engine's longest prompts.

It has its own thread, because an engine without requests takes no steps: changes of its last step must be sent too.
"""

import logging
import threading
from collections.abc import Callable

from vllm.v1.request import Request

from ..client import NodeClient
from ..contained import contained
from ..core.local.kv_messages import PrefixesInMemory, RegisterLayout
from ..core.prefix.plan import segments_that_fit
from ..core.records.ids import SegmentKey
from ..core.records.layout import Layout
from ..core.records.limits import MiB
from .cached_segments import CachedSegments

logger = logging.getLogger("vllm.hyperspace")

REPORT_S = 1.0
LOAD_PERMILLE_MAX = (1 << 16) - 1


class EngineReport:
    """The report of one engine. `cached` is None where vLLM doesn't say what leaves its cache."""

    def __init__(
        self,
        client: NodeClient,
        engine: Callable[[], RegisterLayout | None],
        requests_at_once: int,
        prompt_tokens_max: int,
        cached: CachedSegments | None,
    ) -> None:
        self._prompt_tokens_max = prompt_tokens_max
        self._client, self._engine, self._requests_at_once, self._cached = client, engine, requests_at_once, cached
        self._requests: set[str] = set()  # running or waiting
        self._told: frozenset[SegmentKey] = frozenset()
        self._present: frozenset[SegmentKey] = frozenset()
        self._told_load = -1
        self._epoch = 0
        self._over = threading.Event()

    def start(self) -> None:
        """Report until closed."""
        threading.Thread(target=self._run, name="hyperspace-report", daemon=True).start()

    def added(self, request: Request) -> None:
        """Count a new request."""
        self._requests.add(request.request_id)

    def finished(self, request: Request) -> None:
        """A request has ended."""
        self._requests.discard(request.request_id)

    def report(self) -> None:
        """Tell the node what has changed since the last report, if anything has."""
        if self._cached is not None:
            self._cached.look()
            present = self._cached.present()
            self._present = self._present if present is None else present
        if not self._client.connected or not self._in_session():
            return
        load = min(1000 * len(self._requests) // self._requests_at_once, LOAD_PERMILLE_MAX)
        present = self._present
        if load == self._told_load and present is self._told:
            return
        message = PrefixesInMemory(load, tuple(present - self._told), tuple(self._told - present))
        if self._client.send(message):
            self._told, self._told_load = present, load

    def close(self) -> None:
        """End the thread."""
        self._over.set()

    def _in_session(self) -> bool:
        """Whether the node is there. A new session is given the engine's layout first."""
        epoch = self._client.epoch
        if epoch != self._epoch:
            engine = self._engine()
            if engine is None or not self._client.send(engine):
                return False
            self._check_arena(engine.layout)
            self._epoch, self._told, self._told_load = epoch, frozenset(), -1
        return True

    def _check_arena(self, layout: Layout) -> None:
        segments = self._prompt_tokens_max // layout.segment_tokens
        fits, whole_bytes = segments_that_fit(layout, segments, self._client.arena_bytes)
        if fits < segments:
            logger.warning(
                "hyperspace: the node's arena of %d MiB holds %d tokens of this model's KV, less than a prompt of %d "
                "(max_model_len): the end of longer ones is computed every time. Set arena_bytes to %d MiB or more.",
                self._client.arena_bytes // MiB,
                fits * layout.segment_tokens,
                self._prompt_tokens_max,
                -(-2 * whole_bytes // MiB),  # half of an arena is for what is being written
            )

    def _run(self) -> None:
        report = contained()(self.report)
        while not self._over.wait(REPORT_S):
            report()
