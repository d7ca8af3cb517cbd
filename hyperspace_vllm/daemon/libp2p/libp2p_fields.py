"""Counts the fields of an encoded protobuf message without decoding it: what they cost is known before it is spent."""

from typing import Any

from libp2p.exceptions import ParseError


def count_fields(message: bytes, kind: Any, most: int) -> int:
    """Count an encoded message's fields, those of the messages in it included; `kind` is its protobuf descriptor.

    Raises ParseError for a message that is malformed, or has more than `most`.
    """
    return _count(message, 0, len(message), kind, 0, most)


def _count(message: bytes, at: int, end: int, kind: Any, fields: int, most: int) -> int:
    while at < end:
        key, at = _varint(message, at)
        fields += 1
        if fields > most:
            raise ParseError("too many fields")
        match key & 7:
            case 0:
                _, at = _varint(message, at)
            case 1:
                at += 8
            case 2:
                size, begin = _varint(message, at)
                at = begin + size
                field = kind.fields_by_number.get(key >> 3)
                if size and at <= end and field is not None and field.message_type is not None:
                    fields = _count(message, begin, at, field.message_type, fields, most)
            case 5:
                at += 4
            case _:
                raise ParseError("malformed message")
    if at > end:
        raise ParseError("malformed message")
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    value = 0
    for number, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, at + number + 1
    raise ParseError("malformed message")
