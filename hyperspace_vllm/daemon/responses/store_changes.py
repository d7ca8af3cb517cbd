"""Changes of the response database for the network core: entries that this node can serve now, or no longer can.

Gathered while a transaction runs, and reported after its commit, in pieces that are small for an event loop.
"""

import contextlib
import sqlite3
from collections.abc import Callable
from typing import NamedTuple

from ...core.records.ids import NetworkId, RequestKey
from ...core.records.limits import CLOCK_SKEW_MS
from ...core.response.cache_proof import request_hash


class ServableEntry(NamedTuple):
    """An entry that may leave the node until it expires; `computed` by this node, not fetched."""

    request_hash: bytes
    expires_at_ms: int
    computed: bool


# What can be served now, and the request hashes of what no longer can. Called from the writer's thread, so it hands
# over, e.g. by loop.call_soon_threadsafe.
Listener = Callable[[tuple[ServableEntry, ...], tuple[bytes, ...]], None]

_TOLD_MAX = 256  # in one call: 5 ms of the event loop's time
PROOF_SIGNER = slice(104, 136)  # in an encoded CacheProof

# Nothing but quick_check has looked at the values, and that lets a flipped bit turn one type into another: hence casts.
_LIVE = f"""
SELECT id, CAST(request_key AS BLOB), CAST(proof AS BLOB), CAST(expires_at_ms AS INTEGER) FROM entries
WHERE id < ?1 AND expires_at_ms > ?2 AND computed_at_ms <= ?2 + {CLOCK_SKEW_MS} AND scope IN ('network', 'public')
ORDER BY id DESC LIMIT ?3
"""


class StoreChanges:
    """The changes of one transaction; the last one for a request hash counts."""

    def __init__(self) -> None:
        self._stored: dict[bytes, ServableEntry] = {}
        self._gone: dict[bytes, None] = {}

    def stored(self, entry: ServableEntry) -> None:
        """This entry has come."""
        self._gone.pop(entry.request_hash, None)
        self._stored[entry.request_hash] = entry

    def gone(self, hash_: bytes) -> None:
        """The entry with this request hash can't be served any more."""
        self._stored.pop(hash_, None)
        self._gone[hash_] = None

    def tell(self, listener: Listener) -> None:
        """Pass it all on, a few at a time."""
        gone, stored = tuple(self._gone), tuple(self._stored.values())
        with contextlib.suppress(RuntimeError):  # the listener's event loop has closed
            for at in range(0, max(len(gone), len(stored)), _TOLD_MAX):
                listener(stored[at : at + _TOLD_MAX], gone[at : at + _TOLD_MAX])


class StartupScan:
    """Walks once through what a database held when its node started, youngest first."""

    def __init__(self, network: NetworkId, own_key: bytes) -> None:
        self._network = network
        self._own_key = own_key
        self._below = (1 << 63) - 1  # entries of lower ids are still to be told; new ones are above
        self.done = False

    def next(self, database: sqlite3.Connection, count: int, now_ms: int) -> StoreChanges:
        """The next entries, out of `count`, that may leave this node."""
        rows = database.execute(_LIVE, (self._below, now_ms, count)).fetchall()
        changes = StoreChanges()
        for number, key, proof, expires_at_ms in rows:
            self._below = number
            # An entry from before the network's name changed has a proof that no peer accepts.
            if len(key) == 32 and request_hash(self._network, RequestKey(key)) == proof[:32]:
                changes.stored(ServableEntry(proof[:32], expires_at_ms, proof[PROOF_SIGNER] == self._own_key))
        self.done = len(rows) < count
        return changes
