"""One owner's signed deltas since its snapshot, as they came: what a relay passes on."""

from ..records.registry_delta import RegistryDelta, decode_delta

_IGNORED_SEQUENCE = (1 << 63) - 1


class DeltaLog:
    """The snapshot of an epoch and the updates 1, 2, 3, … after it, none missing. Knows nothing of signatures."""

    def __init__(self, raw: bytes, snapshot: RegistryDelta) -> None:
        assert snapshot.kind == "snapshot"
        self.epoch = snapshot.epoch
        self.expires_at_ms = snapshot.expires_at_ms  # without it nothing that follows can be read
        self.sequence = 0
        self.size = len(raw)
        self._raws = [raw]

    def __len__(self) -> int:
        """Deltas, the snapshot among them."""
        return len(self._raws)

    def __getitem__(self, sequence: int) -> bytes:
        return self._raws[sequence]

    @property
    def update_bytes(self) -> int:
        """Bytes of the deltas after the snapshot."""
        return self.size - len(self._raws[0])

    def append(self, raw: bytes, update: RegistryDelta) -> None:
        """Add the next one."""
        assert (update.epoch, update.sequence) == (self.epoch, self.sequence + 1)
        self.sequence += 1
        self.size += len(raw)
        self._raws.append(raw)

    def after(self, epoch: int, sequence: int) -> list[bytes]:
        """The deltas that a peer lacks if it has this owner's log up to `sequence` of `epoch`."""
        if epoch > self.epoch:
            return []
        return self._raws[sequence + 1 :] if epoch == self.epoch else self._raws

    def payloads(self, start: int) -> tuple[bytes, ...]:
        """The loro exports from sequence `start` on."""
        return tuple(decode_delta(raw).payload for raw in self._raws[start:])

    def clear(self) -> None:
        """Keep only the epoch and its expiry; no later delta of the epoch is the next one."""
        self._raws = []
        self.size = 0
        self.sequence = _IGNORED_SEQUENCE
