"""The models, fingerprints and prefixes that the engines of this host serve together, for this node's PeerRecord.

Each session reports its part, which ends with the session. Keys of segments become ids here: keys stay on the host.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from ...core.events.node_state import ServedChanged
from ...core.local.kv_messages import PrefixesInMemory
from ...core.records.ids import NetworkId, wire_id
from ...core.records.limits import PEER_RECORD_AGAIN_MS, VRAM_SEGMENTS_MAX
from ...core.records.peer_record import DIGESTS_MAX
from ...core.records.vram_digest import make_digest

SETTLE_S = 0.2  # an engine's layout, load and prefixes come one after the other


@dataclass(slots=True)
class _Part:
    """The part of one session."""

    model: bytes | None = None
    fingerprint: bytes | None = None
    load_permille: int | None = None
    segments: dict[bytes, None] = field(default_factory=dict)  # ids, in the order in which they came


class Served:
    """`tell` is called with the sum of all changes, at most once per PEER_RECORD_AGAIN_MS, on the creating loop."""

    def __init__(self, network: NetworkId, tell: Callable[[ServedChanged], None]) -> None:
        self._network = network
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._parts: dict[bytes, _Part] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._told_at = float("-inf")
        self._told = ServedChanged((), (), 0, b"")

    def model(self, session: bytes, digest: bytes) -> None:
        """A session answers requests for a model."""
        part = self._part(session)
        if part.model != digest:
            part.model = digest
            self._changed()

    def fingerprint(self, session: bytes, digest: bytes) -> None:
        """A session loads and saves KV of a fingerprint."""
        part = self._part(session)
        if part.fingerprint != digest:
            part.fingerprint = digest
            self._changed()

    def prefixes(self, session: bytes, message: PrefixesInMemory) -> None:
        """A scheduler's load, and the segments that came into and left its engine's KV cache."""
        part = self._part(session)
        part.load_permille = message.load_permille
        for key in message.gone:
            part.segments.pop(wire_id(self._network, key), None)
        for key in message.come[: VRAM_SEGMENTS_MAX - len(part.segments)]:
            part.segments[wire_id(self._network, key)] = None
        self._changed()

    def ended(self, session: bytes) -> None:
        """A session is over."""
        if self._parts.pop(session, None) is not None:
            self._changed()

    def close(self) -> None:
        """Do not call `tell` any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _part(self, session: bytes) -> _Part:
        return self._parts.setdefault(session, _Part())  # as many as there are sessions

    def _changed(self) -> None:
        if self._timer is None:
            at = max(self._loop.time() + SETTLE_S, self._told_at + PEER_RECORD_AGAIN_MS / 1000)
            self._timer = self._loop.call_at(at, self._tell_now)

    def _tell_now(self) -> None:
        self._timer = None
        self._told_at = self._loop.time()
        served = _together(list(self._parts.values()))
        if served != self._told:
            self._told = served
            self._tell(served)


def _together(parts: list[_Part]) -> ServedChanged:
    """The union of all parts; beyond the bounds of a record, the first ones. The load is the average of all engines."""
    models = dict.fromkeys(part.model for part in parts if part.model is not None)
    fingerprints = dict.fromkeys(part.fingerprint for part in parts if part.fingerprint is not None)
    loads = [part.load_permille for part in parts if part.load_permille is not None]
    segments = dict.fromkeys(islice((each for part in parts for each in part.segments), VRAM_SEGMENTS_MAX))
    return ServedChanged(
        tuple(islice(models, DIGESTS_MAX)),
        tuple(islice(fingerprints, DIGESTS_MAX)),
        round(sum(loads) / len(loads)) if loads else 0,
        make_digest(segments),
    )
