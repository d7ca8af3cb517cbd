"""The answers to lookups of prefixes that schedulers of this host wait for."""

from collections.abc import Callable
from typing import Literal

from ...core.local.kv_messages import PrefixAnswer
from ...core.local.message_fields import NAME_CHARS_MAX
from ...core.local.messages import NodeMessage
from ...core.local.slab import LoadedRow
from ..lookup_numbers import LookupNumbers

Source = Literal["none", "memory", "disk", "network"]


class PrefixLookups:
    """Answers lookups. `send` queues a message for the client at a route."""

    def __init__(self, send: Callable[[bytes, NodeMessage], bool]) -> None:
        self._send = send
        self.numbers = LookupNumbers()

    def answer(
        self,
        lookup: int,
        end_segment: int,
        rows: tuple[LoadedRow, ...],
        source: Source,
        verified_by: str,
        reason: str,
    ) -> bool:
        """Answer a lookup; one that was released meanwhile is ignored. The lease on `rows` is the lookup's.

        False: the client cannot be reached, and will not release the lookup.
        """
        if (client := self.numbers.client(lookup)) is None:
            return True
        route, client_lookup = client
        verified_by, reason = verified_by[:NAME_CHARS_MAX], reason[:NAME_CHARS_MAX]
        sent = self._send(route, PrefixAnswer(client_lookup, end_segment, rows, source, verified_by, reason))
        if end_segment == 0 or not sent:
            self.numbers.forget(lookup)
        return sent
