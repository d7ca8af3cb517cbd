"""How asking another node can fail, on whichever transport."""


class PeerFailed(Exception):
    """A request got no (or no good) answer: timeout | unreachable | protocol | not_here | busy | io_error."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
