"""Registry documents without loro: a payload is the msgpack of the added and the removed entries.

The daemon's loro worker merges; here every document has one author and its deltas come in order, so there is nothing to
merge and the last change counts.
"""

import msgspec
from nacl.signing import SigningKey

from ..core.events.owner_documents import DeltasImported, DeltasRefused, ImportDeltas, OwnDeltaWritten, WriteRegistry
from ..core.records.ids import NetworkId
from ..core.records.limits import REGISTRY_TTL_MS
from ..core.records.registry_delta import RegistryDelta, encode_delta


class _Change(msgspec.Struct, frozen=True, array_like=True):
    added: tuple[tuple[bytes, int], ...]
    removed: tuple[bytes, ...]


def payload_of(added: tuple[tuple[bytes, int], ...], removed: tuple[bytes, ...]) -> bytes:
    """The payload of a delta with these changes."""
    return msgspec.msgpack.encode(_Change(added, removed))


class Documents:
    """One host's own document and its copies of others'."""

    def __init__(self, network: NetworkId, key: SigningKey) -> None:
        self._network = network
        self._key = key
        self._owner = key.verify_key.encode()
        self._epoch = 0
        self._sequence = 0
        self._copies: dict[bytes, dict[bytes, int]] = {}

    def write(self, change: WriteRegistry, wall_ms: int) -> OwnDeltaWritten:
        """Sign a change of the own document."""
        if change.compact:
            self._epoch, self._sequence = max(self._epoch + 1, wall_ms), 0
        else:
            self._sequence += 1
        removed = () if change.compact else change.removed
        delta = RegistryDelta(
            self._network,
            self._owner,
            self._epoch,
            self._sequence,
            "snapshot" if change.compact else "update",
            wall_ms + REGISTRY_TTL_MS,
            payload_of(change.added, removed),
        )
        return OwnDeltaWritten(delta, encode_delta(delta, self._key))

    def take(self, deltas: ImportDeltas) -> DeltasImported | DeltasRefused:
        """Apply an owner's changes."""
        try:
            changes = [msgspec.msgpack.decode(payload, type=_Change) for payload in deltas.payloads]
        except msgspec.MsgspecError:
            return DeltasRefused(deltas.owner, "malformed")
        if deltas.starts_with_snapshot:
            self._copies[deltas.owner] = {}
        copy = self._copies.get(deltas.owner)
        if copy is None:
            return DeltasRefused(deltas.owner, "worker")
        added: dict[bytes, int] = {}
        removed: dict[bytes, None] = {}
        for change in changes:
            for gone in change.removed:
                if copy.pop(gone, None) is not None:
                    added.pop(gone, None)
                    removed[gone] = None
            for name, expires_at_ms in change.added:
                copy[name] = added[name] = expires_at_ms
                removed.pop(name, None)
        return DeltasImported(
            deltas.owner,
            deltas.epoch,
            deltas.sequence,
            tuple(added.items()),
            () if deltas.starts_with_snapshot else tuple(removed),
            deltas.starts_with_snapshot,
        )

    def forget(self, owner: bytes) -> None:
        """Drop an owner's copy."""
        self._copies.pop(owner, None)
