"""Counts how much a ZeroMQ socket holds of what its peer sent: where bytes go in and where messages come out.

ZeroMQ bounds a frame (MAXMSGSIZE) and the number of whole messages (RCVHWM), but a message may have any number of
frames, and all of them are held until the last has arrived. Under CURVE only the socket can see which frame is the
last. So every frame counts that went in and has not come out: those of an honest peer come out as soon as their message
is whole.

    greeting 64 bytes, then frames: flags u8, length u8 (or u64 where flags has bit 1), body
    body of a message's frame under CURVE: "\\x07MESSAGE", nonce 8, MAC 16, flags 1, the frame itself

Heartbeats are frames that never come out. They are recognised by their size, and limited between two messages so that a
connection with heartbeats alone lasts for eight minutes.
"""

from collections.abc import Iterable

from ...core.records.errors import ProtocolViolation
from ...core.records.limits import KiB

GREETING_BYTES = 64
CURVE_BYTES = 8 + 8 + 16 + 1  # around a frame
HANDSHAKE_FRAMES = 2  # of each side: HELLO and INITIATE, WELCOME and READY
HANDSHAKE_FRAME_BYTES_MAX = 1 * KiB  # the longest, an INITIATE with its metadata, has about 400
SMALL_BYTES_MAX = 64  # a PING with the longest context, and less than most messages
SMALL_FRAMES_MAX = 1024  # between two messages that came out; heartbeats of both sides are two a second
FRAMES_HELD_MAX = 256


class FrameMeter:
    """One connection's incoming side. `frame_bytes_max` is the socket's MAXMSGSIZE."""

    def __init__(self, frame_bytes_max: int, held_bytes_max: int) -> None:
        self._frame_bytes_max = frame_bytes_max + CURVE_BYTES
        self._held_bytes_max = held_bytes_max
        self._head = bytearray()  # the greeting or a frame's header, as far as received
        self._greeted = False
        self._left = 0  # bytes left of the current frame
        self._is_small = False
        self._frames = 0
        self._small = 0
        self.held_frames = 0
        self.held_bytes = 0

    @property
    def full(self) -> bool:
        """Whether no more may go in before something has come out."""
        return self.held_frames > FRAMES_HELD_MAX or self.held_bytes > self._held_bytes_max

    def put_in(self, data: memoryview) -> None:
        """Count bytes that the peer sent; `ProtocolViolation` if they aren't valid for the socket."""
        while data:
            if self._left:
                size = min(self._left, len(data))
                self._left -= size
                self.held_bytes += 0 if self._is_small else size
            else:
                size = min(self._header_bytes() - len(self._head), len(data))
                self._head += data[:size]
                if len(self._head) == self._header_bytes():
                    self._begin()
            data = data[size:]

    def came_out(self, frames: Iterable[int]) -> None:
        """Count a message that the socket gave out, with frames of these sizes."""
        self._small = 0
        for size in frames:
            if size + CURVE_BYTES > SMALL_BYTES_MAX:
                self.held_frames = max(self.held_frames - 1, 0)
                self.held_bytes = max(self.held_bytes - size - CURVE_BYTES, 0)

    def _header_bytes(self) -> int:
        if not self._greeted:
            return GREETING_BYTES
        return 9 if self._head and self._head[0] & 2 else 2

    def _begin(self) -> None:
        head, self._head = bytes(self._head), bytearray()
        if not self._greeted:
            if head[0] != 0xFF or head[10] < 3 or head[12:32] != b"CURVE".ljust(20, b"\0"):
                raise ProtocolViolation("greeting: expected ZMTP 3 with CURVE")
            self._greeted = True
            return
        self._left = int.from_bytes(head[1:], "big")
        self._frames += 1
        in_handshake = self._frames <= HANDSHAKE_FRAMES
        bytes_max = HANDSHAKE_FRAME_BYTES_MAX if in_handshake else self._frame_bytes_max
        if self._left > bytes_max:
            raise ProtocolViolation(f"frame: {self._left} bytes, at most {bytes_max}")
        self._is_small = in_handshake or self._left <= SMALL_BYTES_MAX
        if not self._is_small:
            self.held_frames += 1
            return
        self._small += 1
        if self._small > SMALL_FRAMES_MAX:
            raise ProtocolViolation(f"{self._small} frames without a message")
