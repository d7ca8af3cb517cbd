from collections.abc import Sequence

from typing_extensions import Buffer

CHUNK_ALIGN_BYTES: int

def encode(
    data: Buffer,
    parity: Buffer,
    chunk_bytes: int,
    threads: int,
    isa: str | None,
) -> None: ...
def encode_rows(
    data: Buffer,
    parity: Buffer,
    chunk_bytes: int,
    rows: Sequence[int],
    threads: int,
    isa: str | None,
) -> None: ...
def decode(
    chunks: Sequence[Buffer | None],
    chunk_bytes: int,
    out: Buffer,
    threads: int,
    isa: str | None,
) -> None: ...
def decode_and_check(
    chunks: Sequence[Buffer | None], chunk_bytes: int, out: Buffer, threads: int, isa: str | None
) -> list[int]: ...
def isas() -> list[str]: ...
def gather_blocks(views: Sequence[Buffer], ids: Sequence[Sequence[int]], row: Buffer) -> None: ...
def scatter_blocks(views: Sequence[Buffer], ids: Sequence[Sequence[int]], row: Buffer) -> None: ...
def isa() -> str: ...
