"""The two kinds of errors in input, and how foreign text is printed."""

import json

SHOWN_CHARS_MAX = 300


def printable(foreign: str, chars_max: int = SHOWN_CHARS_MAX) -> str:
    """`foreign` on one line without control characters, truncated: safe in a log, a terminal and an answer."""
    cut = foreign[:chars_max]
    shown = cut if cut.isprintable() else repr(cut)[1:-1]
    return shown + "…" * (len(foreign) > chars_max)


def for_terminal(json_or_text: str) -> str:
    """The text with every unprintable character escaped as in JSON, except line ends; JSON stays JSON."""
    if json_or_text.isprintable():
        return json_or_text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in json_or_text)


class ProtocolViolation(ValueError):
    """A peer or client sent something that the protocol forbids.

    Raised where bytes become values, caught once (in the shell that read the bytes) and charged to the sender. The
    message names the field and the expected value; quotes of the input are made printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Refused(Exception):
    """A well-formed record that this node does not accept: `reason` is one of a small set, used as a metric label."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(printable(f"{reason}: {detail}" if detail else reason))
        self.reason = reason
