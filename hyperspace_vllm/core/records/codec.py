"""Decodes bytes from a socket into one of the messages that the socket allows."""

from typing import TypeVar

import msgspec

from .errors import ProtocolViolation

_Message = TypeVar("_Message")


def decode_frame(
    decoder: msgspec.msgpack.Decoder[_Message], frame: bytes | memoryview, bytes_max: int, what: str
) -> _Message:
    """The message in `frame`; `ProtocolViolation` names the wrong field, after `what`."""
    if len(frame) > bytes_max:
        raise ProtocolViolation(f"{what}: {len(frame)} bytes, at most {bytes_max}")
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # the latter from a damaged string
        raise ProtocolViolation(f"{what}: {error}") from error
