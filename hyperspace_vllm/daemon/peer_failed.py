"""How asking another node can fail, on whichever transport."""

from ..core.records.reason import Reason


class PeerFailed(Exception):
    """A request got no (or no good) answer: timeout | unreachable | protocol | not_here | busy | io_error."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason
