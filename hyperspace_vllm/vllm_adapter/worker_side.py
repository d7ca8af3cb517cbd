"""A worker's half: copies rows from the arena into its blocks, and its blocks into staging slabs.

The ledger: every load in the metadata is a receive that the scheduler promised for this rank, and vLLM expects it back
exactly once, whatever happens to it. `load` settles it as received or failed, and not before its last copy has ended:
vLLM gives the blocks of a failed load to other requests. `transfer_results` reports it.
"""

import functools
import logging
import queue
from collections.abc import Mapping

import torch

from ..client import NodeClient
from ..core.local.kv_messages import NO_ENGINE, RegisterLayout, RowStaged, StagingGranted, WantStaging
from ..core.local.session_messages import Rejected
from ..core.local.slab import LoadedRow, Slab
from ..core.records.errors import Refused
from ..session_lock import SessionLock
from .copy_proof import prove_copies
from .kv_copy import Copier, EncodeDevice, copier_for
from .kv_layout import KVPlan, block_views
from .metadata import PrefixLoad, SegmentSave, StepMetadata
from .older_vllm import KVConnectorTransferResults
from .stats import HyperspaceStats

logger = logging.getLogger("vllm.hyperspace")

STARTUP_WAIT_S = 2.0  # for the node, while the engine starts: its slabs are then granted before the first prompt
SEGMENTS_STAGED_MAX = 32  # slabs held per part: as many as one step may save (scheduler_side.STEP_SAVES_MAX)


class WorkerSide:
    """One per rank. `step_segments` is how many segments a step can fill at most."""

    def __init__(
        self, client: NodeClient, plan: KVPlan, rank: int, step_segments: int, encode_device: EncodeDevice
    ) -> None:
        self._client, self._plan, self._rank, self._encode_device = client, plan, rank, encode_device
        # Two steps' worth: the node frees and grants slabs while the next step computes.
        self._slabs_wanted = min(2 * step_segments, SEGMENTS_STAGED_MAX)
        self._copier: Copier | None = None  # None: L2 is off here
        self._engine: RegisterLayout | None = None  # the layout the node was given in this session
        self._epoch = 0
        self._slabs: dict[int, list[Slab]] = {plan.row_bytes(part): [] for part in range(len(plan.parts))}
        self._asked: dict[int, int] = dict.fromkeys(self._slabs, 0)
        self._settled: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()  # (request id, result)
        self.stats = HyperspaceStats()

    def register(self, kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> None:
        """Take the tensors that vLLM allocated, and slabs to stage from them."""
        try:
            views = block_views(self._plan, kv_caches, num_blocks)
            copier = copier_for(self._plan, views, self._encode_device)
            prove_copies(copier, self._plan, views, num_blocks)
            self._copier = copier
        except Refused as error:
            logger.error("hyperspace: KV sharing is off, this worker's KV isn't as planned: %s", error)
            return
        self._client.wait_connected(STARTUP_WAIT_S)
        self._enter_session()

    @property
    def is_off(self) -> bool:
        """Whether every load would fail."""
        return self._copier is None

    # --- loading ---------------------------------------------------------------------------------

    def load(self, metadata: StepMetadata) -> None:
        """Copy every promised prefix into its blocks."""
        for load in metadata.loads:
            settle = functools.partial(self._settle, load.request_id, self._load(load))
            if self._copier is None:
                settle(False)
            else:
                self._copier.after_copies(settle)

    def transfer_results(self) -> KVConnectorTransferResults:
        """The receives that were settled since the last call."""
        results = KVConnectorTransferResults()
        while not self._settled.empty():
            request_id, result = self._settled.get_nowait()
            results.finished_recving.add(request_id)
            if result != "received":
                results.failed_recving.add(request_id)
            self.stats.count("hyperspace_l2_loads_total", result)
        return results

    def _settle(self, request_id: str, reason: str | None, landed: bool) -> None:
        self._settled.put((request_id, reason or ("received" if landed else "copy_failed")))

    def _load(self, load: PrefixLoad) -> str | None:
        """Start the copies of one load; returns why it failed, or None."""
        if self._copier is None:
            return "off"
        if not self._client.connected:
            return "no_node"
        rows = {(row.part, row.segment): row for row in load.rows if row.rank == self._rank}
        used = []
        for number, part in enumerate(self._plan.parts):
            per_segment = self._plan.segment_tokens // part.block_tokens
            last = load.end_token // part.block_tokens
            block = max(load.start_token // part.block_tokens, part.first_needed_block(load.end_token))
            while block < last:
                segment, within = divmod(block, per_segment)
                end = min(last, (segment + 1) * per_segment)
                row = rows.get((number, segment))
                if row is None or row.slab.length != self._plan.row_bytes(number):
                    return "row_missing"
                run = slice(within * part.block_row_bytes, (within + end - block) * part.block_row_bytes)
                ids = {group: load.blocks[group][block:end] for group in part.groups}
                try:
                    self._copier.scatter(part, ids, self._client.view(row.slab)[run])
                except LookupError:
                    return "lease_lost"
                except RuntimeError as error:
                    return _why_no_copy(error)
                used.append(row)
                block = end
        return self._moved(used)

    def _moved(self, rows: list[LoadedRow]) -> str | None:
        # After the copies, not before: only then is it certain that the row was current while it was copied.
        if not all(self._client.is_current(row.slab) for row in rows):
            return "lease_lost"
        self.stats.count("hyperspace_l2_bytes_total", "loaded", by=sum(row.slab.length for row in rows))
        return None

    # --- saving ----------------------------------------------------------------------------------

    def save(self, metadata: StepMetadata) -> None:
        """Stage the segments that this step filled."""
        if not metadata.saves:
            return
        skipped = self._why_not_save(metadata.engine)
        if skipped is None:
            self._take_grants()
        for save in metadata.saves:
            for part in save.parts:
                reason = skipped or self._stage(save, part)
                result = "skipped" if reason else "staged"
                self.stats.count("hyperspace_l2_saves_total", result, reason or "new")
        if skipped is None:
            self._ask_for_slabs()

    def _why_not_save(self, engine: RegisterLayout | None) -> str | None:
        if self._copier is None:
            return "off"
        if not self._client.connected:
            return "no_node"
        assert engine is not None
        if self._plan.layout(engine.layout.fingerprint) != engine.layout:
            logger.error("hyperspace: KV sharing is off, this worker's KV layout differs from the scheduler's")
            self._copier.close()
            self._copier = None
            return "off"
        self._enter_session()
        if self._engine != engine:
            if not self._client.send(engine):
                return "node_busy"
            self._engine = engine
        return None

    def _stage(self, save: SegmentSave, number: int) -> str | None:
        """Gather one row; returns why it was not, or None."""
        assert self._copier is not None
        slabs = self._slabs[self._plan.row_bytes(number)]
        if not slabs:
            return "no_slab"
        part, slab, epoch = self._plan.parts[number], slabs.pop(), self._epoch
        try:
            row = self._client.view(slab)
        except LookupError:
            return "lease_lost"
        if self._client.epoch != epoch:  # asked after taking the view: the bytes belong to the arena that granted them
            return "lease_lost"
        ids = {group: save.blocks[group] for group in part.groups}

        def staged(landed: bool) -> None:
            if not landed:
                slabs.append(slab)
                return
            # The node quarantines a slab of a lost lease, so what we wrote there is harmless.
            if self._client.epoch != epoch or not self._client.is_current(slab):
                return
            if not self._client.send(RowStaged(save.name, save.segment, number, self._rank, slab)):
                slabs.append(slab)

        try:
            self._copier.gather(part, ids, row, staged)
        except RuntimeError as error:
            slabs.append(slab)
            return _why_no_copy(error)
        self.stats.count("hyperspace_l2_bytes_total", "saved", by=slab.length)
        return None

    # --- the session -----------------------------------------------------------------------------

    def _enter_session(self) -> None:
        """Start a session, which holds none of our slabs; the layout is its first message."""
        epoch = self._client.epoch
        if epoch == self._epoch or not self._client.connected:
            return
        # Fingerprint and engine come from the scheduler with the first step's work; until then only the sizes matter.
        if not self._client.send(RegisterLayout(self._plan.layout(bytes(32)), NO_ENGINE)):
            return
        if self._copier is not None:
            for lock in self._client.take_earlier_locks():
                self._copier.after_copies(functools.partial(_release, lock))
        self._epoch, self._engine = epoch, None
        for size in self._slabs:
            self._slabs[size], self._asked[size] = [], 0
        self._ask_for_slabs()

    def _take_grants(self) -> None:
        for message in self._client.receive():
            if isinstance(message, StagingGranted) and message.row_bytes in self._slabs:
                self._asked[message.row_bytes] = 0
                self._slabs[message.row_bytes].extend(message.slabs)
            elif isinstance(message, Rejected):
                logger.error("hyperspace: the node rejected a message of a worker: %s", message.detail)

    def _ask_for_slabs(self) -> None:
        for size, slabs in self._slabs.items():
            parts = sum(self._plan.row_bytes(part) == size for part in range(len(self._plan.parts)))
            missing = parts * self._slabs_wanted - len(slabs) - self._asked[size]
            if missing > 0 and self._client.send(WantStaging(size, missing)):
                self._asked[size] += missing

    def close(self) -> None:
        """Finish the copies in flight; the client's goodbye ends the leases."""
        if self._copier is not None:
            self._copier.close()


def _why_no_copy(error: RuntimeError) -> str:
    if isinstance(error, torch.OutOfMemoryError):  # vLLM left the device less than one row
        return "no_memory"
    logger.error("hyperspace: the device refused a KV copy: %s", error)
    return "copy_failed"


def _release(lock: SessionLock, landed: bool) -> None:
    lock.release()  # completed or not, no copy writes into that session's slabs any more
