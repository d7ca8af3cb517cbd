"""What this node can serve: announced by gossip, written into the registry, provided in the DHT.

A computed response is announced. One that was fetched is only while it is popular enough to want more copies than there
are, so that popular answers replicate themselves.
"""

from collections.abc import Iterable

from ..events.dht import Provide
from ..events.prefix_writing import RowsStored
from ..events.stored_responses import ResponseStored
from ..events.vocabulary import NetworkEffect
from ..peers.trust import Trust
from ..records.announcement import PrefixEntry, ResponseEntry
from ..records.ids import public_key_of
from ..records.limits import REGISTRY_TTL_MS
from ..records.now import Now
from ..registry.registry import Registry
from ..response.announcer import Outbox
from ..response.dht_use import ProvideQueue
from ..response.popularity import Popularity, replicas_wanted
from ..response.providers import Providers


class Servable:
    """Responses and rows; `registry` is None where a Redis registry replaces it."""

    def __init__(
        self,
        outbox: Outbox,
        registry: Registry | None,
        providers: Providers,
        popularity: Popularity,
        trust: Trust,
        now: Now,
    ) -> None:
        self._outbox = outbox
        self._registry = registry
        self._providers = providers
        self._popularity = popularity
        self._trust = trust
        self._provides = ProvideQueue(now)

    def on_stored(self, event: ResponseStored, now: Now) -> list[NetworkEffect]:
        """Announce what was computed; what was fetched only while the popular want more copies than there are."""
        if not event.computed:
            told = self._providers.of(event.request_hash, now)
            copies = sum(self._trust.is_chosen(public_key_of(peer)) for peer in told)  # a stranger's may be none
            if copies >= replicas_wanted(self._popularity.requests(event.request_hash, now)):
                return []
        self._register(event.request_hash, event.expires_at_ms)
        self._outbox.add(ResponseEntry(event.request_hash, event.expires_at_ms))
        requests = self._popularity.requests(event.request_hash, now)
        self._provides.add(_dht_key(event.request_hash), requests)
        return self._outbox.flush(now)

    def on_gone(self, hashes: tuple[bytes, ...]) -> None:
        """These responses can no longer be served."""
        if self._registry is not None:
            self._registry.note_gone(hashes)
        self._outbox.remove(frozenset(hashes))
        self._provides.remove(_dht_key(request_hash) for request_hash in hashes)

    def on_rows_stored(self, event: RowsStored, now: Now) -> None:
        """Announce rows of an object with the next batch, unless they are private."""
        if not event.shareable:
            return
        expires_at_ms = now.wall_ms + REGISTRY_TTL_MS
        for row_id in event.row_ids:
            self._register(row_id, expires_at_ms)
            self._outbox.add(PrefixEntry(row_id, event.manifest, event.commitment, expires_at_ms))
        # One record an object: a node that has the prompt asks the object's holders for the rest.
        self._provides.add(f"/kv-prefix/{event.fingerprint.hex()}/{event.row_ids[0].hex()}", 0.0)

    def on_not_provided(self, key: str) -> None:
        """Try again, after all others."""
        self._provides.add(key, 0.0)

    def provide(self, now: Now) -> list[NetworkEffect]:
        """The key whose turn it is."""
        key = self._provides.due(now)
        return [Provide(key)] if key is not None else []

    def next_deadlines_ms(self) -> Iterable[int | None]:
        """When the next batch may go, and when `provide` has something to do."""
        return self._outbox.next_deadline_ms(), self._provides.next_deadline_ms()

    def _register(self, name: bytes, expires_at_ms: int) -> None:
        if self._registry is not None:
            self._registry.note_stored(name, expires_at_ms)


def _dht_key(request_hash: bytes) -> str:
    return f"/cache/{request_hash.hex()}"
