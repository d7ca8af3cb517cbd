"""This node's own PeerRecord: when it is signed again, and with which sequence number."""

from collections.abc import Callable

from ..records.ids import NetworkId
from ..records.limits import CLOCK_SKEW_MS, PEER_RECORD_AGAIN_MS, PEER_RECORD_TTL_MS
from ..records.now import Now
from ..records.peer_record import PeerRecord, check_peer_record

RENEW_MS = PEER_RECORD_TTL_MS // 5
OUTBID_MS = 1_000  # a record of an earlier run is answered within this time


class OwnRecord:
    """`record` is the newest, `raw` its encoding; `sign` makes one of a sequence number and an expiry date."""

    def __init__(self, network: NetworkId, sign: Callable[[int, int], PeerRecord], now: Now) -> None:
        self._network = network
        self._sign = sign
        self._renewed_at_ms = self.renew_at_ms = now.mono_ms
        self._sequence = now.wall_ms  # greater than in an earlier run
        self.renew(now)

    def renew(self, now: Now) -> None:
        """Sign a new record."""
        self._sequence += 1
        self._renewed_at_ms, self.renew_at_ms = now.mono_ms, now.mono_ms + RENEW_MS
        self.record = self._sign(self._sequence, now.wall_ms + PEER_RECORD_TTL_MS)
        self.raw = self.record.encode()

    def renew_soon(self) -> None:
        """The record's contents have changed: renew it now, or PEER_RECORD_AGAIN_MS after the last renewal."""
        self.renew_at_ms = min(self.renew_at_ms, self._renewed_at_ms + PEER_RECORD_AGAIN_MS)

    def must_renew(self, now: Now) -> bool:
        """Whether the record is old, or the wall clock was set so far that peers may refuse the record's date."""
        left_ms = self.record.expires_at_ms - now.wall_ms
        is_dated = PEER_RECORD_TTL_MS - RENEW_MS - CLOCK_SKEW_MS <= left_ms <= PEER_RECORD_TTL_MS + CLOCK_SKEW_MS
        return now.mono_ms >= self.renew_at_ms or not is_dated

    def outbid(self, earlier: PeerRecord, now: Now) -> None:
        """A peer has a record of an earlier run, whose clock was ahead: sign one with a higher sequence number."""
        if earlier.sequence > self._sequence:
            check_peer_record(earlier, self._network, earlier.expires_at_ms - 1)  # whatever its date
            self._sequence = earlier.sequence
            self.renew_at_ms = min(self.renew_at_ms, now.mono_ms + OUTBID_MS)
