"""What anybody can make a node's log say, and how much of it."""

import logging

import pytest

from hyperspace_vllm.core.records.errors import SHOWN_CHARS_MAX, ProtocolViolation, Refused, printable
from hyperspace_vllm.daemon.logs import LINE_CHARS_MAX, PEER_BURST, PEER_S, SPARING_BURST, SPARING_S, Lines, Sparing

FORMAT = "%(levelname)s %(message)s"


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("plain, and ümlaut", "plain, and ümlaut"),
        ("two\nlines\r\n", "two\\nlines\\r\\n"),
        ("\x1b[31mred\x9b0m", "\\x1b[31mred\\x9b0m"),
        ("turned \u202eround\u2028", "turned \\u202eround\\u2028"),
        ("\ud800", "\\ud800"),
        ("x" * (SHOWN_CHARS_MAX + 1), "x" * SHOWN_CHARS_MAX + "…"),
        ("\n" * 100_000, "\\n" * SHOWN_CHARS_MAX + "…"),
    ],
)
def test_foreign_text_is_one_cut_line_without_control_characters(foreign: str, shown: str) -> None:
    assert printable(foreign) == shown
    assert str(ProtocolViolation(foreign)) == shown
    assert len(str(Refused("reason", foreign))) <= len(shown) + len("reason: …")


def record(message: object, *args: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("hyperspace_vllm", logging.WARNING, "place.py", 1, message, args, None)
    made.__dict__.update(more)
    return made


def test_a_record_is_one_line_whatever_is_in_it() -> None:
    line = Lines(FORMAT).format(record("peer says %s", "x\nCRITICAL forged\x1b[0m" + "y" * 100_000))
    assert line.startswith("WARNING peer says x\\nCRITICAL forged\\x1b[0m")
    assert len(line) < 2 * LINE_CHARS_MAX
    assert line.isprintable()


def test_a_traceback_forges_no_line() -> None:
    try:
        raise ValueError("bad\n2026-11-29 CRITICAL forged\x1b[0m" + "y" * 100_000)
    except ValueError as error:
        made = record("failed")
        made.exc_info = (type(error), error, error.__traceback__)
    first, *others = Lines(FORMAT).format(made).split("\n")
    assert first == "WARNING failed"
    assert others
    assert all(line.startswith("    ") and line.isprintable() and len(line) < 2 * LINE_CHARS_MAX for line in others)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr("hyperspace_vllm.daemon.token_bucket.time.monotonic", lambda: now[0])
    return now


def test_no_place_in_the_code_writes_without_a_bound(clock: list[float]) -> None:
    sparing = Sparing()
    written = sum(sparing.filter(record("anything")) for _ in range(10_000))
    assert written == SPARING_BURST
    clock[0] += 10 * SPARING_S
    assert sum(sparing.filter(record("anything")) for _ in range(10_000)) == 10
    assert sparing.filter(logging.LogRecord("other", logging.INFO, "place.py", 2, "another place", (), None))


def test_one_peer_takes_no_other_peers_lines(clock: list[float]) -> None:
    sparing = Sparing()
    assert sum(sparing.filter(record("peer", peer="loud")) for _ in range(10_000)) == PEER_BURST
    assert sparing.filter(record("peer", peer="other"))
    clock[0] += PEER_S
    assert sum(sparing.filter(record("peer", peer="loud")) for _ in range(10_000)) == 1


def test_any_number_of_peers_write_no_more_than_one_place_may(clock: list[float]) -> None:
    sparing = Sparing()
    assert sum(sparing.filter(record("peer", peer=str(number))) for number in range(10_000)) == SPARING_BURST
    assert len(sparing._places) <= 1024


def test_what_was_left_out_is_counted_in_the_next_line(clock: list[float]) -> None:
    sparing = Sparing()
    for _ in range(SPARING_BURST + 7):
        sparing.filter(record("anything"))
    clock[0] += SPARING_S
    last = record("anything")
    assert sparing.filter(last)
    assert Lines(FORMAT).format(last) == "WARNING anything (7 like it left out)"
