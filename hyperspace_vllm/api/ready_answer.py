"""An answer that only has to be sent.

A client may take for ever to read it. So nothing else is held meanwhile: not the request, whose parsed JSON can take
thirty times its bytes, and not what the answer was made from.
"""

import time
from dataclasses import dataclass

from prometheus_client import Histogram

from .client_end import Client
from .stored_answer import Sending, StoredAnswer


@dataclass(frozen=True, slots=True)
class Ready:
    """An answer for `client`. It counts in `sending` until it is sent; `seconds` then gets the time since `began_s`."""

    answer: StoredAnswer
    client: Client
    sending: Sending
    seconds: Histogram | None
    began_s: float

    async def send(self) -> None:
        """Send all of it."""
        for message in self.answer.messages(self.sending):
            await self.client.send(message)
        if self.seconds is not None:
            self.seconds.observe(time.perf_counter() - self.began_s)
