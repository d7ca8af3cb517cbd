"""The types of the fields of local messages, each with its bound."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

NAME_CHARS_MAX = 256

Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Name = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
U16 = Annotated[int, Meta(ge=0, le=(1 << 16) - 1)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Scope = Literal["private", "network", "public"]


class LocalMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    """A message of the local socket: the tag names its type, and an unknown field is an error."""
