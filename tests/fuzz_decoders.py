"""A fuzz target over every decoder: any bytes become a value, or the one error that the decoder documents.

    python -m tests.fuzz_decoders --seconds 60 [--only NAME] [--seed N]

With `atheris` installed (pip install atheris) libFuzzer is guided by coverage; without it valid messages are mutated at
random. Either stops at the first input that breaks a decoder, and prints it.
"""

import argparse
import gc
import importlib.util
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FunctionType

from tests.support.fuzz.decoders import TARGETS, run


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """A valid message with a few bytes changed, inserted, removed or repeated."""
    data = bytearray(raw)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                data[at:at] = rng.choice((b"\x00", b"\xff" * 8, b"\xc1", b'"', b"[", b"{", b"1e999", b"\\ud800", b"\n"))
            case 2:
                del data[at : at + rng.randrange(1, 9)]
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case _:
                data = data[:at]
    return bytes(data)


def fuzz_at_random(names: list[str], seconds: float, seed: int) -> int:
    """Mutate the samples for so long; the exit status."""
    rng, ends_at, count = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < ends_at:
        name = rng.choice(names)
        raw = mutated(rng, rng.choice(TARGETS[name][1]))
        try:
            run(name, raw)
        except BaseException:
            traceback.print_exc()
            print(f"{name} broke on {raw!r} (seed {seed}, input {count})", file=sys.stderr)
            return 1
        count += 1
    print(f"{count} mutated inputs to {len(names)} decoders in {seconds:.0f} s, nothing found (seed {seed})")
    return 0


def fuzz_with_atheris(names: list[str], seconds: float, seed: int) -> None:
    """Hand over to libFuzzer; it ends the process."""
    import atheris  # type: ignore[import-untyped]

    # Ours alone, where they lie: instrument_all takes a minute, and instrument_imports misses editable installs.
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and str(function.__module__).startswith("hyperspace_vllm"):
            atheris.instrument_func(function)

    def one(raw: bytes) -> None:
        if raw:
            run(names[raw[0] % len(names)], raw[1:])

    with tempfile.TemporaryDirectory() as corpus:
        for number, name in enumerate(names):
            for index, sample in enumerate(TARGETS[name][1]):
                (Path(corpus) / f"{name}-{index}").write_bytes(bytes([number]) + sample)
        flags = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-max_len={64 * 1024}", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *flags, corpus], one)
        atheris.Fuzz()


def main() -> int:
    """Run; exit 1 when a decoder broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", choices=TARGETS, action="append")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--random", action="store_true", help="don't use atheris")
    options = parser.parse_args()
    names = options.only or list(TARGETS)
    for name in names:
        for sample in TARGETS[name][1]:
            run(name, sample)
    if importlib.util.find_spec("atheris") and not options.random:
        fuzz_with_atheris(names, options.seconds, options.seed)
        return 0
    return fuzz_at_random(names, options.seconds, options.seed)


if __name__ == "__main__":
    sys.exit(main())
