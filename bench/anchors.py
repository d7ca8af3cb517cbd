"""Baselines for the erasure code: memcpy, XOR, ISA-L, zfec, PyECLib and galois, each doing the same work.

A `Work` is one operation on one size's buffers. Each library provides a function that does it, with everything possible
(tables, inverted matrices, fragments) prepared outside the measurement, or None where it has no such operation.

    python -m bench.anchors        # installs the Python ones (the extra `bench`), names what the system lacks
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import mmap
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyperspace_vllm import native

ROOT = Path(__file__).resolve().parents[1]
K, TOTAL = native.DATA_CHUNKS, native.TOTAL_CHUNKS
OPERATIONS = ("encode", "decode_16", "decode_32", "decode_0", "encode_one")
ONE_ROW = 7
ISAL_COLUMN = 2048
# galois computes a product per row in NumPy, 1,000 times as slowly as the others, so it codes only this many bytes of
# each chunk.
GALOIS_COLUMNS = 4096

Run = Callable[[], object]


def lost_chunks(operation: str) -> set[int]:
    """Of 64: every other chunk of both halves, all the data, or all the parity."""
    return {
        "decode_16": set(range(0, TOTAL, 2)),
        "decode_32": set(range(K)),
        "decode_0": set(range(K, TOTAL)),
    }.get(operation, set())


class Buffers:
    """Data, parity and output of one chunk size, page-aligned; rows are an odd multiple of 256 bytes apart.

    Our own codec codes those 256 bytes too; the others, and all GB/s, count the nominal size.
    """

    def __init__(self, chunk_bytes: int) -> None:
        self.nominal = chunk_bytes
        self.stride = chunk_bytes + native.CHUNK_ALIGN_BYTES
        self.data, self.parity, self.out = (self._allocate() for _ in range(3))
        rng = np.random.default_rng(1)
        self.data.view(np.uint64)[:] = rng.integers(0, 2**64, (K, self.stride // 8), np.uint64)
        native.encode(self.data, self.parity, self.stride)

    def _allocate(self) -> np.ndarray:
        memory = np.frombuffer(mmap.mmap(-1, K * self.stride), np.uint8).reshape(K, self.stride)
        memory[:] = 1  # every page is there before the measurement
        return memory

    @property
    def source_bytes(self) -> int:
        """Bytes of data that one operation codes, of all 32 chunks."""
        return K * self.nominal

    def chunks(self, lost: set[int]) -> list[np.ndarray | None]:
        """The 64 chunks as our decoder takes them."""
        rows = [*self.data, *self.parity]
        return [None if i in lost else rows[i] for i in range(TOTAL)]


@dataclass(frozen=True)
class Work:
    """An operation on buffers, in any library's code word: each makes its own parity."""

    operation: str
    buffers: Buffers
    isa: str | None = None

    @property
    def lost(self) -> set[int]:
        return lost_chunks(self.operation)

    @property
    def lost_data(self) -> list[int]:
        return sorted(self.lost & set(range(K)))


def hyperspace(work: Work, threads: int = 1) -> Run:
    """Our codec. The chunks present in decode_16 are in place: as with the others, only the lost ones are written."""
    b, isa = work.buffers, work.isa
    if work.operation == "encode":
        return lambda: native.encode(b.data, b.parity, b.stride, threads=threads, isa=isa)
    if work.operation == "encode_one":
        out = b.out[:1]
        return lambda: native.encode_rows(b.data, out, b.stride, [ONE_ROW], threads=threads, isa=isa)
    chunks = b.chunks(work.lost)
    if work.operation == "decode_16":
        b.out[:] = b.data
        chunks[:K] = [None if i in work.lost else b.out[i] for i in range(K)]
    b.out[work.lost_data] = 0
    run: Run = lambda: native.decode(chunks, b.stride, b.out, threads=threads, isa=isa)  # noqa: E731
    run()
    assert np.array_equal(b.out, b.data)
    return run


def memcpy(work: Work) -> Run | None:
    """The C library's memcpy, of as many bytes as there are data, into another buffer."""
    if work.operation not in ("encode", "decode_0"):
        return None
    b = work.buffers
    to, source = b.out.ctypes.data, b.data.ctypes.data
    return lambda: ctypes.memmove(to, source, b.source_bytes)


class Isal:
    """ISA-L's erasure code and its XOR, through a shim that is compiled on first use."""

    def __init__(self) -> None:
        source = Path(__file__).with_name("anchors.c")
        shim = ROOT / "build" / f"anchors-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
        if not shim.exists():
            shim.parent.mkdir(exist_ok=True)
            command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-lisal", "-o", str(shim)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise ImportError(f"ISA-L: sudo apt-get install -y gcc libisal-dev\n{done.stderr}")
        self._library = ctypes.CDLL(str(shim))

    def code(self, work: Work, column: int | None) -> Run | None:
        """Called directly (None), or column by column, so that its inputs stay in the cache between outputs."""
        b = work.buffers
        if work.operation == "decode_0":
            return None
        if work.operation == "encode":
            have, want, into = range(K), range(K, TOTAL), b.out
        elif work.operation == "encode_one":
            have, want, into = range(K), range(K + ONE_ROW, K + ONE_ROW + 1), b.out
        else:
            have, want, into = self._decoding(work)
        tables = (ctypes.c_ubyte * (32 * K * len(want)))()
        numbers = ctypes.c_int * K
        if self._library.isal_tables(numbers(*have), numbers(*want), len(want), tables) != 0:
            raise AssertionError("any 32 rows of a Cauchy code have an inverse")
        rows = [*b.data, *b.parity]
        sources, targets = _pointers([rows[i] for i in have]), _pointers([*into[: len(want)]])
        avx2 = int(work.isa == "avx2")
        column_bytes = ctypes.c_size_t(column or b.nominal)
        size = ctypes.c_size_t(b.nominal)
        run: Run = lambda: self._library.isal_code(  # noqa: E731
            avx2, tables, len(want), size, column_bytes, sources, targets
        )
        if work.lost:
            run()
            assert np.array_equal(into[: len(want), : b.nominal], b.data[work.lost_data, : b.nominal])
        return run

    def _decoding(self, work: Work) -> tuple[Sequence[int], Sequence[int], np.ndarray]:
        # Its own code word: the parity that Hyperspace made would decode to something else.
        encode = self.code(Work("encode", work.buffers, work.isa), ISAL_COLUMN)
        assert encode is not None
        encode()
        work.buffers.parity[:] = work.buffers.out
        return [i for i in range(TOTAL) if i not in work.lost], work.lost_data, work.buffers.out

    def xor(self, work: Work) -> Run | None:
        """All 32 chunks to one, as RAID-5 computes its parity."""
        if work.operation != "encode_one":
            return None
        b = work.buffers
        rows, size = _pointers([*b.data, b.out[0]]), ctypes.c_size_t(b.nominal)
        return lambda: self._library.xor_rows(size, rows)


def _pointers(rows: Sequence[np.ndarray]) -> Any:
    return (ctypes.c_void_p * len(rows))(*(row.ctypes.data for row in rows))


def zfec(work: Work) -> Run | None:
    """zfec: a product table per constant, a new `bytes` per output."""
    from zfec import Decoder, Encoder

    encoder = Encoder(K, TOTAL)
    data = [row[: work.buffers.nominal].tobytes() for row in work.buffers.data]
    if work.operation == "decode_0":
        return None
    if work.operation == "encode":
        return lambda: encoder.encode(data, list(range(K, TOTAL)))
    if work.operation == "encode_one":
        return lambda: encoder.encode(data, [K + ONE_ROW])
    everything = [*data, *encoder.encode(data, list(range(K, TOTAL)))]
    have = [i for i in range(TOTAL) if i not in work.lost]
    # It expects a present data chunk in that chunk's own place.
    slots = {i: i for i in have if i < K}
    spare = iter(i for i in have if i >= K)
    numbers = [slots.get(i) if i in slots else next(spare) for i in range(K)]
    chunks, decoder = [everything[i] for i in numbers], Decoder(K, TOTAL)
    assert decoder.decode(chunks, numbers) == data
    return lambda: decoder.decode(chunks, numbers)


def pyeclib(work: Work) -> Run | None:
    """PyECLib over liberasurecode, with ISA-L under it if found. It cuts, copies and frames by itself."""
    from pyeclib.ec_iface import VALID_EC_TYPES, ECDriver

    if work.operation in ("encode_one", "decode_0"):
        return None
    kind = "isa_l_rs_cauchy" if "isa_l_rs_cauchy" in VALID_EC_TYPES else "liberasurecode_rs_vand"
    driver = ECDriver(k=K, m=TOTAL - K, ec_type=kind)
    data = np.ascontiguousarray(work.buffers.data[:, : work.buffers.nominal]).tobytes()
    if work.operation == "encode":
        return lambda: driver.encode(data)
    have = [fragment for i, fragment in enumerate(driver.encode(data)) if i not in work.lost]
    assert driver.decode(have) == data
    return lambda: driver.decode(have)


class Galois:
    """A matrix product over GF(2^8) with our own code's matrix: the slow twin."""

    def __init__(self) -> None:
        import galois

        self._field = galois.GF(2**8, irreducible_poly=0x11D)
        # Column i of the matrix is the parity of the i-th unit vector.
        units, parity = np.eye(K, dtype=np.uint8), np.empty((K, K), np.uint8)
        native.encode(units, parity, K)
        self._code = self._field(np.concatenate([units, parity]))

    def code(self, work: Work) -> Run | None:
        if work.operation == "decode_0":
            return None
        columns = min(work.buffers.nominal, GALOIS_COLUMNS)
        everything = np.concatenate([work.buffers.data[:, :columns], work.buffers.parity[:, :columns]])
        have = [i for i in range(TOTAL) if i not in work.lost][:K]
        want = {"encode": range(K, TOTAL), "encode_one": [K + ONE_ROW]}.get(work.operation, work.lost_data)
        if work.operation in ("encode", "encode_one"):
            have = list(range(K))
        import galois

        matrix = self._code[list(want)] @ np.linalg.inv(self._code[have])
        assert isinstance(matrix, galois.FieldArray)
        sources = self._field(everything[have])
        return lambda: matrix @ sources


def missing_modules() -> list[str]:
    """The Python libraries to compare and to plot with that are not installed."""
    return [name for name in ("zfec", "pyeclib", "galois", "matplotlib") if importlib.util.find_spec(name) is None]


def main() -> int:
    """Install the extra `bench`; 1 if ISA-L must be installed by hand."""
    if missing_modules():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = project["optional-dependencies"]["bench"]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wanted], check=True)
    try:
        Isal()
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
