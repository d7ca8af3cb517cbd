"""The two ways in which input can be wrong."""


class ProtocolViolation(ValueError):
    """A peer or client sent something that the protocol forbids.

    Raised where bytes become values, caught once (in the shell that read the bytes) and charged to the
    sender. The message names the field and what was expected.
    """


class Refused(Exception):
    """A well-formed record that we don't believe: `reason` is one of a small set, used as a metric label."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
