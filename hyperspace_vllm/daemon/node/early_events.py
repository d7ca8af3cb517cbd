"""What happens before a node has joined its network, kept until then."""

from collections import deque

from ...core.events.node_state import ServedChanged
from ...core.events.prefix_writing import RowsStored
from ...core.events.stored_responses import ResponsesGone, ResponseStored
from ...core.events.vocabulary import NetworkEvent

KEPT_MAX = 20_000  # responses, and events of rows; more are not announced
# Of connections and open requests, which libp2p bounds; before it joins, a node knows no author of gossip.
PEER_EVENTS_MAX = 1_024


class EarlyEvents:
    """Responses and rows that can be served, what the engines serve now, and everything else in its order."""

    def __init__(self) -> None:
        self._responses: dict[bytes, ResponseStored] = {}
        self._rows: list[RowsStored] = []
        self._served: list[ServedChanged] = []
        self._of_peers: deque[NetworkEvent] = deque(maxlen=PEER_EVENTS_MAX)

    def add(self, event: NetworkEvent) -> None:
        """Keep an event, if there is room."""
        match event:
            case ResponseStored(name):
                if len(self._responses) < KEPT_MAX:
                    self._responses[name] = event
            case ResponsesGone(names):
                for name in names:
                    self._responses.pop(name, None)
            case RowsStored():
                if len(self._rows) < KEPT_MAX:
                    self._rows.append(event)
            case ServedChanged():
                self._served = [event]
            case _:
                self._of_peers.append(event)

    def take(self) -> list[NetworkEvent]:
        """All of them; none is kept any more."""
        events = [*self._responses.values(), *self._rows, *self._served, *self._of_peers]
        for kept in (self._responses, self._rows, self._served, self._of_peers):
            kept.clear()
        return events
