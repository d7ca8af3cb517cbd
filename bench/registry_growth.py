"""Size of a registry document over a million updates: what a new node downloads from an owner that keeps writing.

The real machine decides when to write and when to compact, real loro makes the payloads, real keys sign them; only the
clock is simulated: 250 ms between two writes. Half of the entries are withdrawn, half are left to expire. The bytes are
those of the signed snapshot and the signed updates since; `written` is what they would be without compaction. At the
end the log is imported as another node would import it, and must hold exactly the owner's entries.

    python -m bench.registry_growth [--updates 1000000] [--live 5000] [--json]
"""

import argparse
import json
import random
import time
from collections import deque
from dataclasses import asdict, dataclass

from nacl.signing import SigningKey

from hyperspace_vllm.core.events.owner_documents import OwnDeltaWritten, WriteRegistry
from hyperspace_vllm.core.records.ids import network_id
from hyperspace_vllm.core.records.limits import REGISTRY_TTL_MS, REGISTRY_WRITE_MS
from hyperspace_vllm.core.records.now import Now
from hyperspace_vllm.core.records.peer_wire import WantDeltas
from hyperspace_vllm.core.records.registry_delta import RegistryDelta, decode_delta, encode_delta
from hyperspace_vllm.core.registry.registry import Registry
from hyperspace_vllm.daemon.workers.registry_worker import OwnDocument, PeerDocument

START_MS = 1_790_000_000_000
CHANGES_PER_WRITE = 100
POINTS = 100


@dataclass(frozen=True, slots=True)
class Growth:
    """`curve` holds (updates so far, bytes of the log, bytes ever written)."""

    updates: int
    live: int
    epochs: int
    log_bytes_max: int
    log_bytes_end: int
    written_bytes: int
    seconds: float
    curve: list[tuple[int, int, int]]


class _Shell:
    """Performs WriteRegistry as daemon/registry_documents does, in this process."""

    def __init__(self) -> None:
        self._network = network_id("bench")
        self._key = SigningKey(bytes(32))
        self.owner = self._key.verify_key.encode()
        self.registry = Registry(self._network, self.owner, lambda owner: None, random.Random(1), _at(START_MS))
        self._document = OwnDocument(())
        self._epoch = self._sequence = 0
        self.epochs = 0
        self.written_bytes = 0

    def tick(self, now_ms: int) -> None:
        for effect in self.registry.on_tick(_at(now_ms)):
            assert isinstance(effect, WriteRegistry)
            if effect.compact:
                self._document = OwnDocument(effect.added)
                self._epoch, self._sequence = now_ms, 0
                self.epochs += 1
                payload = self._document.snapshot()
            else:
                self._sequence += 1
                payload = self._document.change(effect.added, effect.removed)
                self.written_bytes += len(payload)
            delta = RegistryDelta(
                self._network,
                self.owner,
                self._epoch,
                self._sequence,
                "snapshot" if effect.compact else "update",
                now_ms + REGISTRY_TTL_MS,
                payload,
            )
            self.registry.on_own_delta(OwnDeltaWritten(delta, encode_delta(delta, self._key)), _at(now_ms))


def measure(updates: int, live: int) -> Growth:
    """Write `updates` changes to a document of about `live` entries."""
    shell, rng = _Shell(), random.Random(7)
    started = time.monotonic()
    lifetime_ms = live * 2 * REGISTRY_WRITE_MS // CHANGES_PER_WRITE
    now_ms, done, largest = START_MS, 0, 0
    held: deque[tuple[bytes, int, bool]] = deque()  # id, end, whether it is withdrawn rather than left to expire
    curve: list[tuple[int, int, int]] = []
    while done < updates:
        for _ in range(CHANGES_PER_WRITE // 2):
            id, end_ms, taken_back = rng.randbytes(32), now_ms + lifetime_ms, rng.random() < 0.5
            held.append((id, end_ms, taken_back))
            shell.registry.note_stored(id, now_ms + REGISTRY_TTL_MS if taken_back else end_ms)
            done += 1
        while held and held[0][1] <= now_ms:
            id, _, taken_back = held.popleft()
            done += 1
            if taken_back:
                shell.registry.note_gone([id])
        shell.tick(now_ms)
        size = shell.registry.stats().log_bytes
        largest = max(largest, size)
        if done >= len(curve) * updates // POINTS:
            curve.append((done, size, shell.written_bytes))
        now_ms += REGISTRY_WRITE_MS
    _check(shell, {id for id, _, _ in held}, now_ms - REGISTRY_WRITE_MS)
    return Growth(
        updates=done,
        live=len(held),
        epochs=shell.epochs,
        log_bytes_max=largest,
        log_bytes_end=shell.registry.stats().log_bytes,
        written_bytes=shell.written_bytes,
        seconds=time.monotonic() - started,
        curve=curve,
    )


def _at(now_ms: int) -> Now:
    """This moment, by a virtual clock."""
    return Now(now_ms, now_ms)


def _check(shell: _Shell, held: set[bytes], now_ms: int) -> None:
    raws = shell.registry.answer(WantDeltas(()), _at(now_ms)).deltas
    imported = PeerDocument(0).import_(tuple(decode_delta(raw).payload for raw in raws), with_snapshot=True)
    assert {id for id, expires_at_ms in imported.added if expires_at_ms > now_ms} == held


def sparkline(values: list[int]) -> str:
    """One character per value, from zero to the largest."""
    top = max(values) or 1
    return "".join("▁▂▃▄▅▆▇█"[value * 7 // top] for value in values)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=1_000_000)
    parser.add_argument("--live", type=int, default=5_000, help="entries at any time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    growth = measure(options.updates, options.live)
    if options.json:
        print(json.dumps(asdict(growth)))
        return
    sizes = [size for _, size, _ in growth.curve]
    largest, last = growth.log_bytes_max / 1024, growth.log_bytes_end / 1024
    print(f"{growth.updates:,} updates, {growth.live:,} entries, {growth.epochs} epochs, {growth.seconds:.0f} s")
    print(f"snapshot + updates: at most {largest:,.0f} KiB, {last:,.0f} KiB at the end")
    print(f"  {sparkline(sizes)}")
    print(f"never compacted:    {growth.written_bytes / 1024:,.0f} KiB and growing")
    print(f"  {sparkline([written for _, _, written in growth.curve])}")


if __name__ == "__main__":
    main()
