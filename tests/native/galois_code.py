"""The slow twin of the erasure code: galois, with any numbers of chunks. Imported late, it takes seconds.

`python -m tests.native.galois_code` makes the vectors in `vectors/rs32_64.json` again.
"""

from __future__ import annotations

import json

import numpy as np

from tests.support.paths import VECTORS

POLYNOMIAL = 0x11D
BASIS = (0x01, 0xD6, 0x98, 0x92, 0x56, 0xC8, 0x58, 0xE6)


def point(index: int) -> int:
    total = 0
    for bit, element in enumerate(BASIS):
        if index >> bit & 1:
            total ^= element
    return total


def random_data(chunk_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, chunk_bytes), dtype=np.uint8)


def galois_field():
    import galois

    return galois.GF(2**8, irreducible_poly=POLYNOMIAL)


def galois_parity(data: np.ndarray, parity_chunks: int = 32) -> np.ndarray:
    import galois

    field, k = galois_field(), len(data)
    if parity_chunks == 0:
        return np.empty((0, data.shape[1]), np.uint8)
    points = field([point(j) for j in range(k)])
    parity_points = field([point(k + j) for j in range(parity_chunks)])
    columns = [galois.lagrange_poly(points, field(column))(parity_points) for column in data.T]
    return np.array(columns, np.uint8).T


def make_vectors() -> None:
    count = np.arange(32, dtype=np.uint8)[:, None]
    cases = [
        ("worked example: data chunk j is the byte j + 1", count + 1),
        ("data chunk 0 is 1, the others 0: the first column of the parity matrix", (count == 0).astype(np.uint8)),
        ("random", random_data(37, seed=64)),
    ]
    vectors = [
        {
            "name": name,
            "chunk_bytes": data.shape[1],
            "data": data.tobytes().hex(),
            "parity": galois_parity(data).tobytes().hex(),
        }
        for name, data in cases
    ]
    pinned = {
        "about": "Systematic Reed-Solomon, 32 data and 32 parity chunks; docs/protocol.md, 'Erasure code'",
        "polynomial": POLYNOMIAL,
        "basis": bytes(BASIS).hex(),
        "vectors": vectors,
    }
    (VECTORS / "rs32_64.json").write_text(json.dumps(pinned, indent=1) + "\n")


if __name__ == "__main__":
    make_vectors()
