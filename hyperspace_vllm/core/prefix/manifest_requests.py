"""Requests of one lookup for manifests: each is asked of one peer, and of the next one when that is late or fails."""

from collections.abc import Callable, Mapping

from ..events.prefix_reading import FetchManifest
from ..events.vocabulary import PrefixEffect
from ..records.ids import ManifestDigest, PeerId, RowId, RowKey
from ..records.limits import FETCH_STALL_MS
from .cost_model import MANIFEST_HEDGE_MS
from .deliveries import Deliveries
from .offers import OfferedManifest, Offers

MANIFESTS_IN_FLIGHT_MAX = 4  # each costs 70 KiB and a KZG verification before it can be used


class ManifestRequests:
    """The open requests. Effects go to `emit`."""

    def __init__(
        self,
        lookup: int,
        row_keys: Mapping[RowId, RowKey],
        offers: Offers,
        deliveries: Deliveries,
        emit: Callable[[PrefixEffect], None],
    ) -> None:
        self._lookup = lookup
        self._row_keys = row_keys
        self._offers = offers
        self._deliveries = deliveries
        self._emit = emit
        self._asked: dict[ManifestDigest, OfferedManifest] = {}

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def peers(self) -> set[PeerId]:
        """The peers that are asked."""
        return {peer for manifest in self._asked.values() for peer in manifest.asking}

    def may_ask(self, digest: ManifestDigest) -> bool:
        """Whether the manifest can be asked for now, for the first time."""
        manifest = self._offers.manifests[digest]
        in_flight = sum(1 for asked in self._asked.values() if not asked.slow)
        return not manifest.asking and not manifest.dead and in_flight < MANIFESTS_IN_FLIGHT_MAX

    def ask(self, digest: ManifestDigest, timeout_at_ms: int, now_ms: int) -> bool:
        """Ask the next peer that offers the manifest; if there is none (False), it is late, or dead."""
        manifest, banned = self._offers.manifests[digest], self._offers.banned
        peer = next((p for p in manifest.holders if p not in manifest.tried and p not in banned), None)
        if peer is None:
            manifest.slow = bool(manifest.asking)
            manifest.dead = not manifest.asking
            return False
        self._deliveries.manifest_asked(peer, now_ms)
        manifest.tried.add(peer)
        manifest.asking.add(peer)
        self._asked[digest] = manifest
        manifest.asked_at_ms = now_ms
        timeout_ms = min(max(timeout_at_ms - now_ms, 1), FETCH_STALL_MS)
        self._emit(FetchManifest(self._lookup, peer, digest, self._row_keys, timeout_ms))
        return True

    def take(self, digest: ManifestDigest) -> OfferedManifest | None:
        """The manifest has come; None if it was not asked for, or came before."""
        return self._asked.pop(digest, None)

    def refused(self, digest: ManifestDigest, peer: PeerId) -> bool:
        """The peer's copy does not verify, or it sent none; False if it was not asked."""
        manifest = self._asked.get(digest)
        if manifest is None or peer not in manifest.asking:
            return False
        self._forget(digest, manifest, peer)
        return True

    def late(self, now_ms: int) -> list[ManifestDigest]:
        """The manifests to ask another peer for."""
        due_ms = now_ms - MANIFEST_HEDGE_MS
        return [digest for digest, asked in self._asked.items() if not asked.slow and asked.asked_at_ms <= due_ms]

    def hedge_times_ms(self) -> list[int]:
        """When each becomes late."""
        return [asked.asked_at_ms + MANIFEST_HEDGE_MS for asked in self._asked.values() if not asked.slow]

    def forgive(self, late_ms: int) -> None:
        """This node itself did not run for `late_ms`."""
        for manifest in self._asked.values():
            manifest.asked_at_ms += late_ms

    def ban(self, peer: PeerId) -> None:
        """Expect nothing more of the peer."""
        for digest, manifest in list(self._asked.items()):
            self._forget(digest, manifest, peer)

    def clear(self) -> None:
        """Forget all requests."""
        self._asked.clear()

    def _forget(self, digest: ManifestDigest, manifest: OfferedManifest, peer: PeerId) -> None:
        manifest.asking.discard(peer)
        if not manifest.asking:
            del self._asked[digest]
