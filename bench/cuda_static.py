"""The cost of the CUDA kernels, read from their machine code: no GPU is needed or used.

    python -m bench.cuda_static [--json]

Registers, spills and stack are ptxas's own report on the shipped kernels. Instructions are counted in a build of the
same bodies with one kernel for each phase and warp, all loops unrolled and only the usual path left
(csrc/tests/instruction_counts.cu), so that each is in the listing as often as it runs; the byte counts follow from the
same listing's loads and stores.

The ceilings are *computed*, not measured: source bytes a second if nothing but one resource mattered, at the boost
clock. A kernel's actual rate is below the lowest of them; `make bench-gpu` measures that. Ends with 1 if a kernel
spills or has a stack frame.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC / 'include'}", "-cubin"]
WARP = 32


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak figures from the vendor's data sheets; `alu` is 32-bit integer or logic results per clock and processor."""

    name: str
    arch: str
    processors: int
    ghz: float
    memory_gbps: float
    host_gbps: float  # one direction of its PCIe slot
    alu: int = 64
    issue: int = 128  # thread instructions per clock: four schedulers, a warp each
    shared_bytes: int = 128  # per clock


GPUS = [
    Gpu("A100 SXM 80 GB", "sm_80", 108, 1.41, 2039, 32),
    Gpu("H100 SXM", "sm_90", 132, 1.98, 3350, 64),
    Gpu("B200", "sm_100", 148, 1.965, 8000, 64),
]

# Source bytes that one block of the kernel handles: 128 threads x 4 pieces x 16 bytes, and 32 rows x 1,024 columns.
TILE_BYTES = {"kv_gather": 8192, "kv_scatter": 8192, "rs_encode": 32768, "rs_decode": 32768}
# A copy's four warps do the same work: one was compiled.
WARPS_PER_LISTING = {"kv_gather": 4, "kv_scatter": 4, "rs_encode": 1, "rs_decode": 1}
# Bytes to and from device memory for each source byte: encoding writes 32 data and 32 parity chunks.
MEMORY_BYTES = {"kv_gather": 2, "kv_scatter": 2, "rs_encode": 3, "rs_decode": 2}
# Bytes that must cross to or from the host for each source byte.
HOST_BYTES = {"kv_gather": 1, "kv_scatter": 1, "rs_encode": 2, "rs_decode": 1}

# The pipe that issues 64 results a clock for integers and logic; multiply-adds go to the other one.
OTHER_PIPES = ("IMAD", "LD", "ST", "BAR", "BRA", "EXIT", "BSSY", "BSYNC", "S2", "CS2R", "U", "R2UR", "NOP", "WARPSYNC")


@dataclass(frozen=True, slots=True)
class Ptxas:
    """ptxas's report on one kernel for one architecture."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spilled_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost per source byte of one kernel on one architecture."""

    kernel: str
    arch: str
    instructions: float
    alu: float
    multiply_add: float
    global_bytes: float
    shared_bytes: float
    by_phase: dict[int, float]


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or JSON; 0, 1 (spills), 2 (no nvcc)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        print("no nvcc here: nothing was compiled", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(2) as pool:
        archs = [gpu.arch for gpu in GPUS]
        reports = [one for many in pool.map(lambda arch: ptxas_report(arch, Path(directory)), archs) for one in many]
        costs = [one for many in pool.map(lambda arch: count(arch, Path(directory)), archs) for one in many]
    if args.json:
        print(json.dumps({"kernels": [asdict(r) for r in reports], "costs": [asdict(c) for c in costs]}, indent=1))
    else:
        print_tables(reports, costs)
    bad = [report for report in reports if report.stack_bytes or report.spilled_bytes]
    for report in bad:
        print(f"{report.kernel} on {report.arch} keeps registers in memory: {report}", file=sys.stderr)
    return 1 if bad else 0


def compile_with(source: Path, cubin: Path, arch: str, *flags: str) -> str:
    """Compile for one architecture; returns ptxas's output."""
    done = subprocess.run(
        [*NVCC, f"-arch={arch}", *flags, "-o", str(cubin), str(source)], capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"nvcc failed on {source.name}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def ptxas_report(arch: str, directory: Path) -> list[Ptxas]:
    """ptxas's report on the shipped kernels."""
    said = compile_with(CSRC / "cuda" / "launch.cu", directory / f"launch_{arch}.cubin", arch, "-Xptxas", "-v")
    found = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    return [
        Ptxas(kernel_name(mangled), arch, int(registers), int(stack), int(stores) + int(loads))
        for mangled, stack, stores, loads, registers in found
    ]


def kernel_name(mangled: str) -> str:
    """`kv_gather` for the mangled name of run_kernel<Gather<true>>."""
    for part, name in (
        ("Gather", "kv_gather"),
        ("Scatter", "kv_scatter"),
        ("Encode", "rs_encode"),
        ("Decode", "rs_decode"),
    ):
        if part in mangled:
            return name + (", unaligned" if "ILb0E" in mangled else "")
    return mangled


def count(arch: str, directory: Path) -> list[Cost]:
    """The straight-line build's instructions, added up over phases and warps."""
    cubin = directory / f"counts_{arch}.cubin"
    compile_with(CSRC / "tests" / "instruction_counts.cu", cubin, arch)
    by_kernel: dict[str, dict[int, Counter[str]]] = {name: {} for name in TILE_BYTES}
    for function, lines in listings(cubin):
        kernel, phase, _warp = function.rsplit("_", 2)
        by_kernel[kernel].setdefault(int(phase), Counter()).update(classify(function, lines))
    return [cost_of(kernel, arch, phases) for kernel, phases in by_kernel.items()]


def cost_of(kernel: str, arch: str, phases: dict[int, Counter[str]]) -> Cost:
    scale = WARPS_PER_LISTING[kernel] * WARP / TILE_BYTES[kernel]
    total = sum(phases.values(), Counter())
    return Cost(
        kernel,
        arch,
        instructions=total["all"] * scale,
        alu=total["alu"] * scale,
        multiply_add=total["multiply-add"] * scale,
        global_bytes=total["global bytes"] * scale,
        shared_bytes=total["shared bytes"] * scale,
        by_phase={phase: counts["all"] * scale for phase, counts in sorted(phases.items())},
    )


def listings(cubin: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(function, instructions with their addresses) of a compiled file."""
    said = subprocess.run([disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for text in said.split("Function : ")[1:]:
        yield text.split()[0], re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", text, re.MULTILINE)


def disassembler() -> str:
    """CUDA's own cuobjdump, or the one that Triton installs."""
    found = shutil.which("cuobjdump")
    if found is None:
        brought = list(Path(sys.prefix).glob("lib/python*/site-packages/triton/backends/nvidia/bin/cuobjdump"))
        found = str(brought[0]) if brought else None
    if found is None:
        sys.exit("cuobjdump is neither on the PATH nor among Triton's tools: can't read machine code")
    return found


def classify(function: str, lines: list[tuple[str, str]]) -> Counter[str]:
    """Instructions by pipe of one warp, and bytes moved by its 32 lanes, per lane."""
    counts: Counter[str] = Counter()
    for address, text in lines:
        words = text.split()
        opcode = words[1] if words[0].startswith("@") else words[0]
        if opcode.startswith("BRA"):
            target = int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16)
            if target == int(address, 16):  # padding after the end
                break
            if target < int(address, 16):
                sys.exit(f"{function} has a loop at {address}: its instructions can't be counted")
        counts["all"] += 1
        if opcode.startswith("IMAD"):
            counts["multiply-add"] += 1
        elif not opcode.startswith(OTHER_PIPES):
            counts["alu"] += 1
        size = 16 if ".128" in opcode else 8 if ".64" in opcode else 4
        if opcode.startswith(("LDG", "STG")):
            counts["global bytes"] += size
        elif opcode.startswith(("LDS", "STS")):
            counts["shared bytes"] += size
    return counts


def ceilings(gpu: Gpu, cost: Cost) -> dict[str, float]:
    """Source GB/s if only this resource mattered."""
    clocks = gpu.processors * gpu.ghz
    found = {
        "instructions": clocks * gpu.issue / cost.instructions,
        "integer and logic": clocks * gpu.alu / cost.alu,
        "device memory": gpu.memory_gbps / MEMORY_BYTES[cost.kernel],
        "PCIe": gpu.host_gbps / HOST_BYTES[cost.kernel],
    }
    if cost.shared_bytes:
        found["shared memory"] = clocks * gpu.shared_bytes / cost.shared_bytes
    return found


def print_tables(reports: list[Ptxas], costs: list[Cost]) -> None:
    """Print the tables of docs/benchmarks.md in Markdown."""
    print("| kernel | " + " | ".join(f"{gpu.arch} registers" for gpu in GPUS) + " | stack | spilled |")
    print("|---|" + "---:|" * (len(GPUS) + 2))
    for kernel in sorted({report.kernel for report in reports}):
        mine = {report.arch: report for report in reports if report.kernel == kernel}
        registers = " | ".join(str(mine[gpu.arch].registers) for gpu in GPUS)
        stack, spilled = (max(getattr(r, field) for r in mine.values()) for field in ("stack_bytes", "spilled_bytes"))
        print(f"| {kernel} | {registers} | {stack} B | {spilled} B |")
    print(
        "\n| per source byte | arch | instructions | integer, logic | multiply-add | global B | shared B | by phase |"
    )
    print("|---|---|" + "---:|" * 5 + "---|")
    for cost in costs:
        phases = " + ".join(f"{each:.2f}" for each in cost.by_phase.values())
        print(
            f"| {cost.kernel} | {cost.arch} | {cost.instructions:.2f} | {cost.alu:.2f} | {cost.multiply_add:.2f} "
            f"| {cost.global_bytes:.2f} | {cost.shared_bytes:.2f} | {phases} |"
        )
    print("\nComputed ceilings, GB/s of source data (nothing here was measured):\n")
    limits = ["instructions", "integer and logic", "shared memory", "device memory", "PCIe"]
    print("| kernel | GPU | " + " | ".join(limits) + " |")
    print("|---|---|" + "---:|" * len(limits))
    for gpu in GPUS:
        for cost in (each for each in costs if each.arch == gpu.arch):
            found = ceilings(gpu, cost)
            print(
                f"| {cost.kernel} | {gpu.name} | "
                + " | ".join(f"{found[x]:.0f}" if x in found else "–" for x in limits)
                + " |"
            )


if __name__ == "__main__":
    sys.exit(main())
