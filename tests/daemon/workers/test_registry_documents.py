"""Registry documents with real loro in its real worker process."""

import asyncio
import os
import random
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import loro
import pytest
from nacl.signing import SigningKey

from bench.registry_growth import measure
from hyperspace_vllm.core.events.owner_documents import (
    DeltasImported,
    DeltasRefused,
    ImportDeltas,
    OwnDeltaWritten,
    WriteRegistry,
)
from hyperspace_vllm.core.records.ids import network_id, peer_id
from hyperspace_vllm.core.records.limits import REGISTRY_DELTA_BYTES_MAX, REGISTRY_ENTRIES_MAX, MiB
from hyperspace_vllm.core.records.rank import Acquaintance, Rank
from hyperspace_vllm.core.records.registry_delta import check_delta, decode_delta
from hyperspace_vllm.core.registry.registry import Registry
from hyperspace_vllm.daemon.workers import registry_documents
from hyperspace_vllm.daemon.workers.registry_documents import RegistryDocuments
from hyperspace_vllm.daemon.workers.registry_worker import OwnDocument, resident_bytes
from tests.support.moments import dated

pytestmark = pytest.mark.io
NETWORK = network_id("test")
NOW_MS = 1_790_000_000_000
UNTIL_MS = NOW_MS + 3_600_000
OWNER = secrets.token_bytes(32)
KEY = SigningKey.generate()


@pytest.fixture
async def documents() -> AsyncIterator[RegistryDocuments]:
    made = RegistryDocuments(NETWORK, KEY, lambda: NOW_MS, nice=0)
    yield made
    await made.close()


def entries(count: int) -> tuple[tuple[bytes, int], ...]:
    return tuple((secrets.token_bytes(32), UNTIL_MS + n) for n in range(count))


def snapshot(*payloads: bytes, owner: bytes = OWNER, epoch: int = NOW_MS) -> ImportDeltas:
    return ImportDeltas(owner, epoch, payloads, True, len(payloads) - 1)


def update(*payloads: bytes, sequence: int = 1, owner: bytes = OWNER, epoch: int = NOW_MS) -> ImportDeltas:
    return ImportDeltas(owner, epoch, payloads, False, sequence)


def exported(write: Callable[[loro.LoroDoc], object]) -> bytes:
    document = loro.LoroDoc()  # type: ignore[no-untyped-call]
    write(document)
    document.commit()
    return document.export(loro.ExportMode.Snapshot())


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def written(documents: RegistryDocuments, effect: WriteRegistry) -> OwnDeltaWritten:
    event = await documents.write(effect)
    assert isinstance(event, OwnDeltaWritten), event
    return event


async def test_what_one_node_writes_another_reads(documents: RegistryDocuments) -> None:
    first, second = entries(100), entries(5)
    begun = await written(documents, WriteRegistry(first, (), compact=True))
    changed = await written(documents, WriteRegistry(second, (first[0][0],), compact=False))
    for event, sequence in ((begun, 0), (changed, 1)):
        delta = decode_delta(event.raw)
        check_delta(event.raw, delta, NETWORK, NOW_MS)
        assert delta == event.delta
        assert (delta.owner, delta.epoch, delta.sequence) == (KEY.verify_key.encode(), NOW_MS, sequence)
    one = await documents.import_deltas(snapshot(begun.delta.payload))
    assert isinstance(one, DeltasImported)
    assert (dict(one.added), one.cleared) == (dict(first), True)
    two = await documents.import_deltas(update(changed.delta.payload))
    assert isinstance(two, DeltasImported)
    assert (dict(two.added), two.removed, two.cleared) == (dict(second), (first[0][0],), False)
    both = await documents.import_deltas(snapshot(begun.delta.payload, changed.delta.payload))
    assert isinstance(both, DeltasImported)
    assert dict(both.added) == dict(first[1:] + second)


async def test_each_epoch_is_higher_and_holds_just_what_is_left(documents: RegistryDocuments) -> None:
    many, few = entries(1000), entries(3)
    first = await written(documents, WriteRegistry(many, (), compact=True))
    second = await written(documents, WriteRegistry(few, tuple(id for id, _ in many), compact=True))
    assert second.delta.epoch == first.delta.epoch + 1
    assert (second.delta.sequence, second.delta.kind) == (0, "snapshot")
    assert len(second.raw) < 1000
    imported = await documents.import_deltas(snapshot(second.delta.payload))
    assert isinstance(imported, DeltasImported)
    assert dict(imported.added) == dict(few)


async def test_the_largest_document_fits_into_one_delta(documents: RegistryDocuments) -> None:
    every = entries(REGISTRY_ENTRIES_MAX)
    event = await written(documents, WriteRegistry(every, (), compact=True))
    assert len(event.raw) <= REGISTRY_DELTA_BYTES_MAX
    imported = await documents.import_deltas(snapshot(event.delta.payload))
    assert isinstance(imported, DeltasImported)
    assert dict(imported.added) == dict(every)


HEX = "ab" * 32
GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "noise": random.Random(1).randbytes(1000),
    "another root": exported(lambda doc: doc.get_map("other").insert(HEX, 1)),
    "text": exported(lambda doc: doc.get_text("entries").insert(0, "hello")),
    "a nested container": exported(lambda doc: doc.get_map("entries").insert_container(HEX, loro.LoroText())),  # type: ignore[no-untyped-call]
    "a short key": exported(lambda doc: doc.get_map("entries").insert("abc", 1)),
    "a key in capitals": exported(lambda doc: doc.get_map("entries").insert(HEX.upper(), 1)),
    "a key of 64 other characters": exported(lambda doc: doc.get_map("entries").insert("é" * 64, 1)),
    "a float": exported(lambda doc: doc.get_map("entries").insert(HEX, 1.0)),
    "a boolean": exported(lambda doc: doc.get_map("entries").insert(HEX, True)),
    "a negative number": exported(lambda doc: doc.get_map("entries").insert(HEX, -1)),
    "null": exported(lambda doc: doc.get_map("entries").insert(HEX, None)),
    "damaged bytes": OwnDocument([(bytes(32), 1)]).snapshot()[:-3] + b"xyz",
}


@pytest.mark.parametrize("what", GARBAGE)
async def test_what_is_no_document_is_refused(documents: RegistryDocuments, what: str) -> None:
    assert await documents.import_deltas(snapshot(GARBAGE[what])) == DeltasRefused(OWNER, "malformed")
    # As an update of a good document, too; and then the document is gone.
    good = OwnDocument(entries(3)).snapshot()
    assert isinstance(await documents.import_deltas(snapshot(good)), DeltasImported)
    assert await documents.import_deltas(update(GARBAGE[what])) == DeltasRefused(OWNER, "malformed")
    assert await documents.import_deltas(update(GARBAGE[what])) == DeltasRefused(OWNER, "worker")


async def test_an_update_that_does_not_continue_its_document_is_refused(documents: RegistryDocuments) -> None:
    own = OwnDocument(entries(3))
    begun = own.snapshot()
    own.change(entries(1), ())
    later = own.change(entries(1), ())
    assert isinstance(await documents.import_deltas(snapshot(begun)), DeltasImported)
    assert await documents.import_deltas(update(later)) == DeltasRefused(OWNER, "malformed")


async def test_too_many_entries_are_refused_at_once_or_bit_by_bit(documents: RegistryDocuments) -> None:
    assert await documents.import_deltas(snapshot(OwnDocument(entries(REGISTRY_ENTRIES_MAX + 1)).snapshot())) == (
        DeltasRefused(OWNER, "too_large")
    )
    own = OwnDocument(entries(REGISTRY_ENTRIES_MAX - 5))
    assert isinstance(await documents.import_deltas(snapshot(own.snapshot())), DeltasImported)
    assert isinstance(await documents.import_deltas(update(own.change(entries(5), ()))), DeltasImported)
    assert await documents.import_deltas(update(own.change(entries(1), ()))) == DeltasRefused(OWNER, "too_large")


async def test_an_update_of_another_epoch_or_owner_finds_no_document(documents: RegistryDocuments) -> None:
    own = OwnDocument(entries(3))
    assert isinstance(await documents.import_deltas(snapshot(own.snapshot())), DeltasImported)
    change = own.change(entries(1), ())
    assert await documents.import_deltas(update(change, epoch=NOW_MS + 1)) == DeltasRefused(OWNER, "worker")
    await documents.forget(OWNER)
    assert await documents.import_deltas(update(change)) == DeltasRefused(OWNER, "worker")


async def test_a_killed_worker_costs_its_documents_which_the_core_rebuilds(documents: RegistryDocuments) -> None:
    """The real core and its real shell; the worker dies between and during jobs."""
    owner_key = SigningKey.generate()
    owner = RegistryDocuments(NETWORK, owner_key, lambda: NOW_MS, nice=0)
    met = Acquaintance(Rank.MET, "10.0.0.1")
    registry = Registry(NETWORK, KEY.verify_key.encode(), lambda owner: met, random.Random(1), dated(NOW_MS))
    source = Registry(NETWORK, owner_key.verify_key.encode(), lambda owner: met, random.Random(2), dated(NOW_MS))
    try:
        every = entries(50)
        now_ms = NOW_MS
        for number, (id, at) in enumerate(every):
            source.note_stored(id, at)
            now_ms += 300
            await perform(source, source.on_tick(dated(now_ms)), owner, now_ms)
            answer = source.answer(registry.want(), dated(now_ms))
            effects = registry.on_deltas(peer_id(owner_key.verify_key.encode()), answer, dated(now_ms))
            job = asyncio.create_task(perform(registry, effects, documents, now_ms))
            if number % 10 == 3 and documents.worker_pid:
                os.kill(documents.worker_pid, signal.SIGKILL)
            await job
            if number == 25 and owner.worker_pid:
                os.kill(owner.worker_pid, signal.SIGKILL)
        for _ in range(20):
            now_ms += 1000
            await perform(source, source.on_tick(dated(now_ms)), owner, now_ms)
            answer = source.answer(registry.want(), dated(now_ms))
            effects = registry.on_deltas(peer_id(owner_key.verify_key.encode()), answer, dated(now_ms))
            await perform(registry, effects + registry.on_tick(dated(now_ms)), documents, now_ms)
        assert registry.entries == 50
        assert all(registry.providers(id, now_ms) for id, _ in every)
    finally:
        await owner.close()


async def perform(registry: Registry, effects: list, documents: RegistryDocuments, now_ms: int) -> None:  # type: ignore[type-arg]
    queue = list(effects)
    while queue:
        effect = queue.pop(0)
        if isinstance(effect, WriteRegistry):
            event = await documents.write(effect)
            if isinstance(event, OwnDeltaWritten):
                queue += registry.on_own_delta(event, dated(now_ms))
            else:
                queue += registry.on_refused(event)
        else:
            assert isinstance(effect, ImportDeltas)
            done = await documents.import_deltas(effect)
            if isinstance(done, DeltasImported):
                registry.on_imported(done)
                queue += registry.on_tick(dated(now_ms))
            else:
                queue += registry.on_refused(done)


async def test_a_worker_that_hangs_is_killed_and_the_next_job_finds_a_new_one(
    documents: RegistryDocuments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_documents, "STALL_S", 0.5)
    good = OwnDocument(entries(3)).snapshot()
    assert isinstance(await documents.import_deltas(snapshot(good)), DeltasImported)
    hung = documents.worker_pid
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    assert await documents.import_deltas(snapshot(good)) == DeltasRefused(OWNER, "lost")
    assert not runs(hung)
    assert isinstance(await documents.import_deltas(snapshot(good)), DeltasImported)


@pytest.mark.parametrize("mebibytes", [48, 64])
async def test_what_makes_loro_wait_for_itself_or_die_is_lost_within_seconds_and_keeps_no_write_waiting(
    documents: RegistryDocuments, mebibytes: int
) -> None:
    bomb = exported(lambda document: document.get_map("entries").insert(HEX, "\0" * (mebibytes * MiB)))
    await written(documents, WriteRegistry(entries(3), (), compact=True))
    began = time.monotonic()
    jobs = [asyncio.create_task(documents.import_deltas(snapshot(bomb, owner=bytes([n] * 32)))) for n in range(4)]
    await asyncio.sleep(0)  # all four wait
    await documents.write(WriteRegistry(entries(1), (), compact=True))
    assert sum(job.done() for job in jobs) <= 1
    assert {done.reason for done in await asyncio.gather(*jobs) if isinstance(done, DeltasRefused)} == {"lost"}
    assert time.monotonic() - began < 4 * registry_documents.JOB_S  # on an idle machine 2 s each


async def test_a_worker_that_does_not_start_is_not_started_again_at_once(
    documents: RegistryDocuments, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    async def no_process(*_: object, **__: object) -> None:
        starts.append(1)
        raise OSError

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_process)
    for _ in range(5):
        assert await documents.import_deltas(snapshot(b"")) == DeltasRefused(OWNER, "worker")
    assert len(starts) == 1


async def test_more_than_10000_entries_and_many_updates_stay_within_150_mib(documents: RegistryDocuments) -> None:
    """40 owners of 500 entries, 40 updates each, and a few owners of the largest document there may be."""
    await written(documents, WriteRegistry(entries(10_000), (), compact=True))
    peak = 0
    for _ in range(40):
        owner, own = secrets.token_bytes(32), OwnDocument(entries(500))
        assert isinstance(await documents.import_deltas(snapshot(own.snapshot(), owner=owner)), DeltasImported)
        changes = [own.change(entries(10), ()) for _ in range(40)]
        assert isinstance(await documents.import_deltas(update(*changes, owner=owner)), DeltasImported)
        peak = max(peak, resident_bytes(str(documents.worker_pid)))
    first = documents.worker_pid
    for _ in range(8):
        large = OwnDocument(entries(REGISTRY_ENTRIES_MAX)).snapshot()
        event = await documents.import_deltas(snapshot(large, owner=secrets.token_bytes(32)))
        assert isinstance(event, DeltasImported)
        peak = max(peak, resident_bytes(str(documents.worker_pid)))
    assert documents.worker_pid == first
    print(f"worker's resident memory at most {peak / MiB:.0f} MiB")
    assert peak < 150 * MiB


@pytest.mark.parametrize("what", ["one long value", "many keys"])
async def test_a_bomb_costs_at_most_the_worker_and_never_its_bound_of_memory(
    documents: RegistryDocuments, what: str
) -> None:
    def write(document: loro.LoroDoc) -> None:
        entries = document.get_map("entries")
        if what == "one long value":
            entries.insert(HEX, "\0" * (150 * MiB))  # 1.2 MB when exported
        else:
            for number in range(140_000):
                entries.insert(f"{number:064x}", 1)

    bomb = exported(write)
    del write
    assert len(bomb) < 2.5 * MiB
    refused = await documents.import_deltas(snapshot(bomb))
    assert isinstance(refused, DeltasRefused)
    good = OwnDocument(entries(3)).snapshot()
    results = [await documents.import_deltas(snapshot(good)) for _ in range(2)]
    assert isinstance(results[-1], DeltasImported)  # the first may have found a worker that was about to end
    assert documents.worker_pid is not None
    assert resident_bytes(str(documents.worker_pid)) < 150 * MiB


def test_a_document_stays_small_over_many_updates_and_holds_what_its_owner_holds() -> None:
    growth = measure(updates=40_000, live=1_000)  # checks the contents itself
    sizes = [size for _, size, _ in growth.curve]
    assert growth.log_bytes_max < 300_000 < growth.written_bytes
    assert max(sizes[len(sizes) // 2 :]) <= 1.3 * max(sizes[: len(sizes) // 2])


async def test_closing_ends_the_process_and_refuses_what_waits(documents: RegistryDocuments) -> None:
    good = OwnDocument(entries(3)).snapshot()
    assert isinstance(await documents.import_deltas(snapshot(good)), DeltasImported)
    pid = documents.worker_pid
    assert pid is not None
    jobs = [asyncio.create_task(documents.import_deltas(snapshot(good))) for _ in range(5)]
    await asyncio.sleep(0)
    await documents.close()
    assert not runs(pid)
    assert DeltasRefused(OWNER, "worker") in await asyncio.gather(*jobs)
    assert documents.worker_pid is None
