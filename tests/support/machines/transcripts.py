"""Transcripts of the core's machines: files of events and of the effects that they must have.

    # a comment
    > at=30 tick
    fetch B for 270         # a comment that stays as long as its effect

A line with `> ` is an event, the lines below it are its effects in their order; time only moves by `at=`, in
milliseconds. `make transcripts` writes into every file what its machine does now: the diff is what a change does.
"""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.support.machines import prefix_script, response_script
from tests.support.paths import ROOT


class Machine(Protocol):
    """A machine that a transcript drives."""

    def play(self, event: str) -> list[str]:
        """Tell it of an event; its effects, each as a line."""


MACHINES: dict[str, Callable[[], Machine]] = {
    "core/prefix": prefix_script.Script,
    "core/response": response_script.Script,
}


def transcripts_of(room: str) -> list[Path]:
    """The transcripts of the machine of a room."""
    return sorted((ROOT / "tests" / room / "transcripts").glob("*.txt"))


def check(path: Path) -> None:
    """Fail with the difference where the machine no longer does what its transcript says."""
    before, now = path.read_text(), replayed(path)
    difference = difflib.unified_diff(before.splitlines(), now.splitlines(), path.name, "what the machine does", n=4)
    assert before == now, "\n".join(difference)


def replayed(path: Path) -> str:
    """The transcript as its machine plays it now, with the comments of the effects that stay."""
    machine = MACHINES[str(path.parent.parent.relative_to(ROOT / "tests"))]()
    lines: list[str] = []
    told: list[str] = []  # effects that the file expects of the last event
    effects: list[str] = []  # those that it had
    for line in [*path.read_text().splitlines(), "> end"]:
        if not line.startswith((">", "#")) and line:
            told.append(line)
            continue
        lines += _with_comments(effects, told)
        effects, told = [], []
        if line == "> end":
            break
        lines.append(line)
        if line.startswith("> "):
            effects = machine.play(_said(line[2:]))
    assert any(line.startswith("> ") for line in lines), f"{path.name} tells of no event"
    return "\n".join(lines) + "\n"


def _with_comments(effects: list[str], told: list[str]) -> list[str]:
    left = list(told)
    lines = []
    for effect in effects:
        line = next((line for line in left if _said(line) == effect), effect)
        if line in left:
            left.remove(line)
        lines.append(line)
    return lines


def _said(line: str) -> str:
    return line.partition("#")[0].strip()


def main() -> int:
    """Write what the machines do now into every transcript, and name the files that changed."""
    for room in MACHINES:
        for path in transcripts_of(room):
            now = replayed(path)
            if now != path.read_text():
                path.write_text(now)
                print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
