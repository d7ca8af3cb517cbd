"""What a simulated host serves to others over the bulk transport: offers, manifests and chunks, in batches.

A reply is what it says, or the reason why there is none; `PROTOCOL` stands for bytes that are no message.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

from ...core.events.prefix_reading import RowOffer
from ...core.records.ids import ManifestDigest, RowId
from ...core.records.limits import LOOKUP_ROWS_MAX, PEER_REQUESTS_MAX, TOTAL_CHUNKS
from ...core.records.reason import Reason
from ..sim_network import SimNetwork
from .kv_liars import KvLiar
from .kv_load import CHUNK_BYTES
from .sim_bulk import Call, SimBulk
from .sim_objects import SimDisk, SimObject

FIND_MS = 1.5  # offers, in the loop and the reader's thread
READ_MS = 1.0  # a batch, from the disk
BATCH_CHUNKS = 8  # 0.8 MB, of READ_BATCH_BYTES
OFFER_BYTES = 48
NOT_HERE_BYTES = 64

Offered = Callable[[tuple[RowOffer, ...] | Reason], None]
Shown = Callable[[SimObject | Reason], None]
Arrived = Callable[[int, bool], None]  # (columns, whether they are what the manifest says)
Lacking = Callable[[Reason], None]


class SimChunkServer:
    """One host's. `admitted` are the hosts whose links it accepts."""

    def __init__(self, network: SimNetwork, bulk: SimBulk, disk: SimDisk, liar: KvLiar | None) -> None:
        self._network = network
        self._bulk = bulk
        self._disk = disk
        self._liar = liar
        self._busy: Counter[int] = Counter()  # requests being read for, by asker
        self.admitted: frozenset[int] = frozenset()

    def find(self, row_ids: tuple[RowId, ...], answered: Offered, call: Call) -> None:
        """Which of these rows there are."""
        self._later(FIND_MS, call, partial(self._find, row_ids, answered, call), answered)

    def show(self, digest: ManifestDigest, answered: Shown, call: Call) -> None:
        """A manifest, its digests and its proof."""
        self._later(FIND_MS, call, partial(self._show, digest, answered, call), answered)

    def send(
        self, digest: ManifestDigest, row: int, columns: int, arrived: Arrived, lacking: Lacking, call: Call
    ) -> None:
        """Chunks of a row, a batch after another, then whether some aren't here."""
        self._later(READ_MS, call, partial(self._send, digest, row, columns, arrived, lacking, call), lacking)

    def _later(self, delay_ms: float, call: Call, act: Callable[[], None], refused: Lacking) -> None:
        if self._busy[call.asker] >= PEER_REQUESTS_MAX:
            self._bulk.reply(call, NOT_HERE_BYTES, partial(refused, Reason.BUSY))
            return
        self._busy[call.asker] += 1

        def done() -> None:
            self._busy[call.asker] -= 1
            if not call.cancelled:
                act()

        self._network.on(call.server, delay_ms, done)

    def _find(self, row_ids: tuple[RowId, ...], answered: Offered, call: Call) -> None:
        lie = self._liar.offers(row_ids) if self._liar is not None else None
        offers = self._disk.offers(row_ids[:LOOKUP_ROWS_MAX]) if lie is None else lie
        count = len(offers) if isinstance(offers, tuple) else 1
        self._bulk.reply(call, NOT_HERE_BYTES + OFFER_BYTES * count, partial(answered, offers))

    def _show(self, digest: ManifestDigest, answered: Shown, call: Call) -> None:
        stored = self._liar.shows(digest) if self._liar is not None else None
        stored = stored or self._disk.get(digest)
        if stored is None or not stored.shareable:
            self._bulk.reply(call, NOT_HERE_BYTES, partial(answered, Reason.NOT_HERE))
        else:
            self._bulk.reply(call, stored.manifest_bytes, partial(answered, stored))

    def _send(
        self, digest: ManifestDigest, row: int, columns: int, arrived: Arrived, lacking: Lacking, call: Call
    ) -> None:
        held, are_good = self._disk.columns(digest, row), True
        stored = self._disk.get(digest)
        if stored is not None and not stored.shareable:
            held = 0
        if self._liar is not None:
            held, are_good = self._liar.sends()
        wanted = [1 << column for column in range(TOTAL_CHUNKS) if columns & held & 1 << column]
        for start in range(0, len(wanted), BATCH_CHUNKS):
            batch = wanted[start : start + BATCH_CHUNKS]
            self._bulk.reply(call, len(batch) * CHUNK_BYTES, partial(arrived, sum(batch), are_good))
        if columns & ~held and not (self._liar is not None and self._liar.is_silent):
            self._bulk.reply(call, NOT_HERE_BYTES, partial(lacking, Reason.NOT_HERE))
