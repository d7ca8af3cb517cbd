"""Measures the cost of making an object verifiable: BLAKE3 digests of its chunks, and KZG over the digests.

One object has the given number of rows of 64 chunks. Medians of interleaved rounds; GB are 10^9 bytes of source data,
half of what is hashed. KZG runs on the digest blob, 128 KiB whatever the object's size.

    encode          each row's parity
    encode, blake3  that, and then the 64 digests of the row, as the node does it
    in strips       the same in strips of 32 KiB of each chunk, hashed as soon as they are coded: still in cache
    blake3          the digests alone
    commit          the digest blob's commitment
    blob proof      the proof that travels with the manifest
    cell proofs     all 64 data cells' and their extension's, made lazily
    verify blob     checked once by a fetcher
    verify cell     checked by a holder of one column

    python -m bench.commitment [--json] [--rows 8] [--chunk-kib 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from importlib.resources import files

import blake3
import ckzg

from bench import machine
from bench.anchors import Buffers
from hyperspace_vllm import native
from hyperspace_vllm.core.records.manifest import digest_blob
from hyperspace_vllm.daemon.workers.kzg_worker import TRUSTED_SETUP_SHA256

STRIP_BYTES = 32 * 1024  # smaller ones leave BLAKE3's 16 lanes idle, larger ones leave the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print {rows: [...]} and nothing else on stdout")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--chunk-kib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    steps = prepare(args.rows, args.chunk_kib * 1024)
    seconds = {name: statistics.median(times) for name, times in interleaved(steps, args.rounds).items()}
    object_gb = args.rows * native.DATA_CHUNKS * args.chunk_kib * 1024 / 1e9
    rows = [
        {"step": name, "seconds_per_object": each, "seconds_per_gb": each / object_gb} for name, each in seconds.items()
    ]
    if args.json:
        print(json.dumps({"object_gb": object_gb, "rows": rows}, indent=1))
        return
    print(machine.describe())
    print(f"object: {args.rows} rows of 64 chunks of {args.chunk_kib} KiB, {object_gb:.3f} GB of source data\n")
    print(f"{'':16}{'ms an object':>14}{'ms a GB':>12}")
    for name, each in seconds.items():
        print(f"{name:16}{1000 * each:14.2f}{1000 * each / object_gb:12.1f}")
    gain = seconds["encode, blake3"] / seconds["in strips"]
    print(f"\nDigests made while a strip is in cache: {gain:.2f} times as fast as in a pass of their own.")


def prepare(rows: int, chunk_bytes: int) -> dict[str, Callable[[], object]]:
    """The steps, each for a whole object. One row's buffers serve as all rows: they are larger than the L2 cache."""
    strips = [Buffers(min(STRIP_BYTES, chunk_bytes)) for _ in range(max(1, chunk_bytes // STRIP_BYTES))]
    buffers = Buffers(chunk_bytes)
    chunks = [memoryview(row) for row in [*buffers.data, *buffers.parity]]
    strip_chunks = [[memoryview(row)[: each.nominal] for row in [*each.data, *each.parity]] for each in strips]
    digests = b"".join(blake3.blake3(chunk).digest() for chunk in chunks) * rows
    setup_file = files("hyperspace_vllm") / "data" / "trusted_setup.txt"
    assert hashlib.sha256(setup_file.read_bytes()).hexdigest() == TRUSTED_SETUP_SHA256
    setup = ckzg.load_trusted_setup(str(setup_file), 0)
    blob = digest_blob(digests, rows)
    commitment = ckzg.blob_to_kzg_commitment(blob, setup)
    proof = ckzg.compute_blob_kzg_proof(blob, commitment, setup)
    cells, cell_proofs = ckzg.compute_cells_and_kzg_proofs(blob, setup)

    def digest() -> None:
        for chunk in chunks:
            blake3.blake3(chunk).digest()

    def encode() -> None:
        native.encode(buffers.data, buffers.parity, buffers.stride)

    def encode_then_digest() -> None:
        encode()
        digest()

    def encode_and_digest_in_strips() -> None:
        hashers = [blake3.blake3() for _ in chunks]
        for strip, pieces in zip(strips, strip_chunks, strict=True):
            native.encode(strip.data, strip.parity, strip.stride)
            for hasher, piece in zip(hashers, pieces, strict=True):
                hasher.update(piece)
        for hasher in hashers:
            hasher.digest()

    def for_all_rows(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: [step() for _ in range(rows)]

    return {
        "encode": for_all_rows(encode),
        "encode, blake3": for_all_rows(encode_then_digest),
        "in strips": for_all_rows(encode_and_digest_in_strips),
        "blake3": for_all_rows(digest),
        "commit": lambda: ckzg.blob_to_kzg_commitment(blob, setup),
        "blob proof": lambda: ckzg.compute_blob_kzg_proof(blob, commitment, setup),
        "cell proofs": lambda: ckzg.compute_cells_and_kzg_proofs(blob, setup),
        "verify blob": lambda: ckzg.verify_blob_kzg_proof(blob, commitment, proof, setup),
        "verify cell": lambda: ckzg.verify_cell_kzg_proof_batch([commitment], [0], [cells[0]], [cell_proofs[0]], setup),
    }


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after an uncounted one."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
