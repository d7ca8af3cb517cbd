"""The CUDA kernels on this machine's GPU: their output checked, their speed, and their cost to a model that decodes.

    python -m bench.gpu [--model gemma|tiny|none] [--json]

In turn: every kernel against the CPU's codec; gather, scatter, encode and decode compared with a plain copy in device
memory (medians of interleaved rounds, rows taken from more memory than the L2 cache holds); encoding and the copy to
the host one after the other and overlapped; and the time of a decoding step of vLLM's engine, in this process so that
both share one CUDA context, with and without rows being coded on a separate stream.

Ends with 0, 1 (a kernel gave wrong bytes), or 2 where there is no GPU to measure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.machine import ROOT, dtype
from bench.servers import MODELS
from hyperspace_vllm import native_cuda
from hyperspace_vllm.core.records.manifest import chunk_bytes_for
from hyperspace_vllm.daemon.kv.object_codec import encode_row
from hyperspace_vllm.native_cuda import KVPages, LayerPages

KEY, NONCE = bytes(range(32)), bytes(range(12))
# One segment of a model like Llama 3 8B: 256 tokens in blocks of 16, 32 layers, 8 heads, 128 + 128 bfloat16 each.
LAYERS, HEADS, BLOCK_TOKENS, HEAD_BYTES, BLOCKS = 32, 8, 16, 512, 16
SEGMENTS = 16  # x 32 MiB: ten times an H100's L2 cache
ROUNDS = 30
DECODED_TOKENS = 128
CODED_EVERY_S = 0.02
HEAD_START_CYCLES = 1_000_000  # half a millisecond


@dataclass
class Report:
    """What was measured; GB/s are of source data, 10^9 bytes."""

    device: str
    commit: str
    row_bytes: int
    copy_gbps: float = 0  # device memory to device memory: half the bandwidth that a copy reaches
    kernels_gbps: dict[str, float] = field(default_factory=dict)
    kernels_of_copy_bandwidth: dict[str, float] = field(default_factory=dict)  # memory traffic relative to a plain copy
    coding: dict[str, float] = field(default_factory=dict)
    decode_step_ms: dict[str, float] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0, 1 or 2 as the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "none"], default="gemma", help="what decodes meanwhile")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    problem = why_not()
    if problem:
        print(f"Nothing was measured: {problem}", file=sys.stderr)
        return 2
    import torch

    torch.cuda.set_device(0)
    cache = Cache(SEGMENTS)
    wrong = wrong_bytes(cache)
    if wrong:
        print(f"Wrong bytes from the GPU: {wrong}", file=sys.stderr)
        return 1
    report = Report(torch.cuda.get_device_name(0), commit(), cache.row_bytes)
    measure_kernels(cache, report)
    measure_overlap(cache, report)
    if args.model != "none":
        measure_decoding(str(MODELS[args.model]), cache, report)
    print(json.dumps(asdict(report), indent=1) if args.json else table(report))
    return 0


def why_not() -> str | None:
    """Why nothing can be measured here, in words."""
    problem = native_cuda.why_unavailable()
    if problem:
        return f"no CUDA kernels to run here ({problem})"
    try:
        import torch
    except ImportError:
        return "torch isn't installed"
    return None if torch.cuda.is_available() else "this build of torch has no CUDA"


class Cache:
    """A paged cache on the GPU with `segments` segments in scattered blocks, and a buffer for one coded row."""

    def __init__(self, segments: int) -> None:
        import torch

        self.num_blocks = segments * BLOCKS + 1
        # Physically [blocks, tokens, heads, bytes], logically heads before tokens, as in attention backends.
        shape = (self.num_blocks, BLOCK_TOKENS, HEADS, HEAD_BYTES)
        make = torch.Generator(device="cuda").manual_seed(1)
        self.views = [
            torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=make).permute(0, 2, 1, 3)
            for _ in range(LAYERS)
        ]
        self.pages = KVPages([layer_of(view) for view in self.views], self.num_blocks, 0)
        ids = list(range(1, self.num_blocks))
        random.Random(1).shuffle(ids)
        self.ids = [[ids[start : start + BLOCKS]] for start in range(0, len(ids), BLOCKS)]
        self.row_bytes = self.pages.block_row_bytes * BLOCKS
        self.chunk_bytes = chunk_bytes_for(self.row_bytes)
        self.row = torch.empty(self.row_bytes, dtype=torch.uint8, device="cuda")
        self.chunks = torch.empty(64 * self.chunk_bytes, dtype=torch.uint8, device="cuda")

    def gather(self, segment: int, stream: int) -> None:
        native_cuda.gather(self.pages, self.ids[segment], self.row.data_ptr(), self.row_bytes, stream)

    def scatter(self, segment: int, stream: int) -> None:
        native_cuda.scatter(self.pages, self.ids[segment], self.row.data_ptr(), self.row_bytes, stream)

    def encode(self, segment: int, stream: int, into: Any = None) -> None:
        chunks = self.chunks if into is None else into
        size, ids = self.chunk_bytes, self.ids[segment]
        native_cuda.encode(self.pages, ids, KEY, NONCE, size, chunks.data_ptr(), chunks.numel(), stream)

    def decode(self, lost: set[int], stream: int) -> None:
        pointers = [None if c in lost else self.chunks.data_ptr() + c * self.chunk_bytes for c in range(64)]
        native_cuda.decode(pointers, self.chunk_bytes, KEY, NONCE, self.row.data_ptr(), self.row_bytes, 0, stream)


def layer_of(view: Any) -> LayerPages:
    """The kernels' description of one layer's byte view, blocks first."""
    return LayerPages(view.data_ptr(), 0, view.stride(0), tuple(view.shape[1:]), tuple(view.stride()[1:]))


# ---- Are the bytes right?


def wrong_bytes(cache: Cache) -> str | None:
    """The first wrong bytes from the GPU, against torch's indexing and the node's own code; None when all are right."""
    import torch

    stream = torch.cuda.current_stream().cuda_stream
    ids = torch.tensor(cache.ids[0][0], device="cuda")
    row = torch.stack([view[ids].flatten(1) for view in cache.views], dim=1).flatten()
    cache.gather(0, stream)
    if not torch.equal(cache.row, row):
        return "gather"
    expected = bytearray(64 * cache.chunk_bytes)
    encode_row(memoryview(row.cpu().numpy()), KEY, NONCE, cache.chunk_bytes, memoryview(expected))
    cache.encode(0, stream)
    if cache.chunks.cpu().numpy().tobytes() != expected:
        return "encode"
    patterns: list[set[int]] = [set(), set(range(32)), *(set(random.Random(n).sample(range(64), 32)) for n in range(8))]
    for lost in patterns:
        cache.row.zero_()
        cache.decode(lost, stream)
        if not torch.equal(cache.row, row):
            return f"decode without {sorted(lost)}"
    cache.scatter(1, stream)  # the row of segment 0 into the blocks of segment 1
    cache.row.zero_()
    cache.gather(1, stream)
    return None if torch.equal(cache.row, row) else "scatter"


# ---- How fast?


def measure_kernels(cache: Cache, report: Report) -> None:
    """GB/s of each kernel, rounds interleaved, next to a plain copy of as many bytes in device memory."""
    import torch

    stream = torch.cuda.current_stream().cuda_stream
    other = torch.empty(SEGMENTS, cache.row_bytes, dtype=torch.uint8, device="cuda")
    work: dict[str, Callable[[int], Any]] = {
        "copy": lambda n: cache.row.copy_(other[n]),
        "gather": lambda n: cache.gather(n, stream),
        "scatter": lambda n: cache.scatter(n, stream),
        "encode": lambda n: cache.encode(n, stream),
        "decode, nothing lost": lambda n: cache.decode(set(range(32, 64)), stream),
        "decode, 16 of 32 lost": lambda n: cache.decode({*range(16), *range(48, 64)}, stream),
        "decode, all data lost": lambda n: cache.decode(set(range(32)), stream),
    }
    for run in work.values():
        run(0)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(ROUNDS):
        for name, run in work.items():
            seconds[name].append(device_seconds(lambda run=run, n=round_ % SEGMENTS: run(n)))  # type: ignore[misc]
    gbps = {name: cache.row_bytes / statistics.median(times) / 1e9 for name, times in seconds.items()}
    report.copy_gbps = gbps.pop("copy")
    report.kernels_gbps = gbps
    # A copy moves two bytes per source byte; encoding three, all others two.
    report.kernels_of_copy_bandwidth = {
        name: each * (1.5 if name == "encode" else 1) / report.copy_gbps for name, each in gbps.items()
    }


def device_seconds(run: Callable[[], Any]) -> float:
    """The GPU's time for the work that `run` enqueues on the current stream."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START_CYCLES)  # otherwise the GPU waits between the events for the host's calls: 50 of 70 us
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class Coder:
    """Codes rows as a worker would: two buffers in turn, one stream for the kernels and one for the copies."""

    def __init__(self, cache: Cache) -> None:
        import torch

        size = cache.chunks.numel()
        self._cache = cache
        self._kernels, self._copies = torch.cuda.Stream(), torch.cuda.Stream()
        self._device = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]

    def code(self, number: int, kernel: bool = True, copy: bool = True) -> None:
        """Enqueue one row; the host waits for nothing."""
        import torch

        slot = number % 2
        self._kernels.wait_event(self._copied[slot])
        if kernel:
            self._cache.encode(number % SEGMENTS, self._kernels.cuda_stream, self._device[slot])
        coded = torch.cuda.Event()
        coded.record(self._kernels)
        self._copies.wait_event(coded)
        if copy:
            with torch.cuda.stream(self._copies):
                self._host[slot].copy_(self._device[slot], non_blocking=True)
        self._copied[slot].record(self._copies)

    def wait(self) -> None:
        self._copies.synchronize()


def measure_overlap(cache: Cache, report: Report) -> None:
    """Encoding alone, the copy of 64 chunks to pinned memory alone, and both, two rows in flight at a time."""
    coder = Coder(cache)
    rows = ROUNDS

    def seconds(**what: bool) -> float:
        coder.wait()
        begin = time.perf_counter()
        for number in range(rows):
            coder.code(number, **what)
        coder.wait()
        return (time.perf_counter() - begin) / rows

    seconds()
    kernel, copy, both = (
        statistics.median(seconds(kernel=k, copy=c) for _ in range(5))
        for k, c in ((True, False), (False, True), (True, True))
    )
    report.coding = {
        "encode_ms": kernel * 1e3,
        "copy_to_host_ms": copy * 1e3,
        "both_ms": both * 1e3,
        "hidden_part_of_encoding": (kernel + copy - both) / kernel,
        "copy_to_host_gbps": cache.chunks.numel() / copy / 1e9,
        "rows_gbps": cache.row_bytes / both / 1e9,
    }


# ---- What does a decoding model notice?


def measure_decoding(model: str, cache: Cache, report: Report) -> None:
    """Median and 99th percentile of one request's decoding step, with a row coded every 20 ms and without, in turn."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: one CUDA context
    from vllm import LLM, SamplingParams

    # Cached parts of a prompt would make the next one's first steps shorter.
    llm = LLM(
        model, dtype=dtype("generate"), gpu_memory_utilization=0.5, max_model_len=1024, enable_prefix_caching=False
    )
    sampling = SamplingParams(max_tokens=DECODED_TOKENS, temperature=0, ignore_eos=True)
    coder = Coder(cache)
    steps: dict[str, list[float]] = {"alone": [], "coding": []}
    for number in range(11):
        name = ("alone", "coding")[number % 2]
        with_coding = coding_in_the_background(coder) if name == "coding" else None
        times = step_seconds(llm.llm_engine, str(number), sampling)
        if with_coding:
            with_coding()
        if number:  # the first warms up
            steps[name] += times
    for name, times in steps.items():
        report.decode_step_ms[f"{name}, median"] = statistics.median(times) * 1e3
        report.decode_step_ms[f"{name}, p99"] = statistics.quantiles(times, n=100)[98] * 1e3


def step_seconds(engine: Any, request: str, sampling: Any) -> list[float]:
    """The time of each step of one request after the first, which computes the prompt."""
    engine.add_request(request, "Once upon a time there was a cache that", sampling)
    times = []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    return times[1:]


def coding_in_the_background(coder: Coder) -> Callable[[], None]:
    """Code a row every 20 ms on its own thread; the returned function ends it."""
    import torch

    over = threading.Event()

    def work() -> None:
        torch.cuda.set_device(0)
        number = 0
        while not over.wait(CODED_EVERY_S):
            coder.code(number)
            coder.wait()
            number += 1

    thread = threading.Thread(target=work)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end


# ---- The report.


def commit() -> str:
    """The checked-out commit, marked if the tree was changed."""
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def table(report: Report) -> str:
    """The report in Markdown."""
    lines = [
        f"{report.device}, commit {report.commit}, rows of {report.row_bytes / 2**20:.0f} MiB in {LAYERS} layers",
        "",
        "| kernel | GB/s of source | memory traffic beside a copy's |",
        "|---|---:|---:|",
        f"| copy in device memory | {report.copy_gbps:.0f} | 1.00 |",
    ]
    for name, gbps in report.kernels_gbps.items():
        lines.append(f"| {name} | {gbps:.0f} | {report.kernels_of_copy_bandwidth[name]:.2f} |")
    lines += ["", "| coding rows | |", "|---|---:|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in report.coding.items()]
    if report.decode_step_ms:
        lines += ["", "| a decoding step, ms | |", "|---|---:|"]
        lines += [f"| {name} | {value:.3f} |" for name, value in report.decode_step_ms.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
