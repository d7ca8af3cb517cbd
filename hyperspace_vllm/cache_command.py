"""`hyperspace cache`: inspect the response database, and have the node delete entries.

Reading happens in place, whether or not the node runs. Deleting is left to the single writer, the node, because its
peers must learn that it no longer serves an entry. Copies that peers fetched before stay there until they expire.
"""

import argparse
import base64
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .client import NodeClient
from .config import Config
from .core.local.response_cache_messages import PURGED_KEYS_MAX, PurgeResponses
from .core.records.errors import ProtocolViolation, for_terminal
from .core.records.ids import peer_id, sha256
from .core.records.limits import RECENT_MS
from .core.response.cache_proof import decode_proof
from .response_db import database_path, unpacked

_CONNECT_S = 5.0
_PURGE_S = 10.0
_COLUMNS = (
    "CAST(request_key AS BLOB), CAST(proof AS BLOB), computed_at_ms, expires_at_ms, size, last_used_ms, hits, scope"
)
_LIST = f"""
SELECT {_COLUMNS} FROM entries WHERE lower(hex(request_key)) LIKE ? ORDER BY last_used_ms DESC, id DESC LIMIT ?
"""
_BODY = "SELECT CAST(body AS BLOB) FROM entries JOIN bodies USING (id) WHERE request_key = ?"


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored response without its body; times are wall-clock milliseconds, `size` is bytes against the quota."""

    request_key: bytes
    proof: bytes
    computed_at_ms: int
    expires_at_ms: int
    size: int
    last_used_ms: int
    hits: int
    scope: str

    def described(self) -> dict[str, Any]:
        """Its fields and those of its CacheProof, for a JSON object."""
        proof = decode_proof(self.proof)
        return {
            "request_key": self.request_key.hex(),
            "request_hash": proof.request_hash.hex(),
            "scope": self.scope,
            "hits": self.hits,
            "size": self.size,
            "computed_at_ms": self.computed_at_ms,
            "expires_at_ms": self.expires_at_ms,
            "last_used_ms": self.last_used_ms,
            "computed_by": peer_id(proof.signer),
            "engine_version": proof.engine_version,
            "model_digest": proof.model_digest.hex(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `hyperspace cache` and their arguments."""
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=text)
        # Here too, and without a default that would override one given before the action.
        added.add_argument("--data-dir", type=Path, metavar="D", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return added

    listing = action("list", "Show the entries, the last used first.")
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="how many (50)")
    listing.add_argument("--json", action="store_true", help="print one JSON object a line")
    show = action("show", "Print an entry with its proof and body as one JSON object.")
    show.add_argument("key", metavar="KEY", help="a RequestKey in hex, or its first digits")
    export = action("export", "Write all entries, with proofs and bodies, one JSON object a line.")
    export.add_argument("file", type=Path, nargs="?", metavar="FILE", help="where to (standard output)")
    purge = action("purge", "Have the running node delete entries.")
    purge.add_argument("keys", nargs="*", metavar="KEY", help="RequestKeys in hex, or their first digits")
    purge.add_argument("--all", action="store_true", help="every entry")


def cache(config: Config, options: argparse.Namespace) -> int:
    """Run one action; returns 1, with a line on stderr that says what to do, when it fails."""
    path = database_path(config.data_dir)
    try:
        with _database(path) as database:
            if options.action == "list":
                return _list(database, options.limit, options.json)
            if options.action == "show":
                return _show(database, options.key)
            if options.action == "export":
                return _export(database, options.file)
            return _purge(config, database, options.keys, options.all)
    except (sqlite3.Error, ProtocolViolation) as error:  # the last: a damaged proof
        return _failed(f"{path}: {error}; is this the node's data directory?")


@contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as database:
        yield database


def _entries(database: sqlite3.Connection, prefix: str = "", limit: int = -1) -> list[Entry]:
    return [Entry(*row) for row in database.execute(_LIST, (f"{prefix.lower()}%", limit))]


def _list(database: sqlite3.Connection, limit: int, as_json: bool) -> int:
    entries = _entries(database, limit=limit)
    if as_json:
        for entry in entries:
            print(json.dumps(entry.described()))
        return 0
    from rich.console import Console
    from rich.table import Table

    (total,) = database.execute("SELECT entries FROM totals").fetchone()
    table = Table(title=f"{len(entries)} of {total} responses")
    for column in ("request key", "scope", "hits", "bytes", "age", "expires in", "computed by"):
        table.add_column(column, justify="right" if column in ("hits", "bytes", "age", "expires in") else "left")
    now_ms = time.time_ns() // 1_000_000
    for entry in entries:
        table.add_row(
            entry.request_key.hex()[:16],
            entry.scope,
            str(entry.hits),
            f"{entry.size:,}",
            _duration(now_ms - entry.computed_at_ms),
            _duration(entry.expires_at_ms - now_ms),
            peer_id(decode_proof(entry.proof).signer),
        )
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    return 0


def _show(database: sqlite3.Connection, prefix: str) -> int:
    found = _named(database, prefix)
    if isinstance(found, str):
        return _failed(found)
    print(for_terminal(json.dumps(_whole(database, found), indent=2, ensure_ascii=False)))
    return 0


def _export(database: sqlite3.Connection, file: Path | None) -> int:
    if file is None:
        _write(database, sys.stdout)
        return 0
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _failed(f"{file} exists and is not overwritten: name another file, or delete this one")
    except OSError as error:
        return _failed(f"{file} can't be created: {error.strerror}; name a file in a directory that you may write to")
    try:
        with os.fdopen(descriptor, "w") as out:
            _write(database, out)
    except BaseException as error:
        file.unlink(missing_ok=True)  # half an export looks like a whole one
        if isinstance(error, OSError):
            return _failed(f"{file} can't be written: {error.strerror}; it is deleted again: name a file elsewhere")
        raise
    return 0


def _write(database: sqlite3.Connection, out: TextIO) -> None:
    for entry in _entries(database):
        print(json.dumps(_whole(database, entry)), file=out)


def _purge(config: Config, database: sqlite3.Connection, prefixes: list[str], everything: bool) -> int:
    if bool(prefixes) == everything:
        return _failed("purge: expected one KEY or more, or --all")
    doomed = [entry.request_key for entry in _entries(database)] if everything else []
    for prefix in prefixes:
        found = _named(database, prefix)
        if isinstance(found, str):
            return _failed(found)
        doomed.append(found.request_key)
    if not config.socket_path.exists() or not _told(config, doomed):
        return _failed(
            f"no node answers in {config.data_dir}. Start one (`hyperspace node --data-dir {config.data_dir}`), or "
            f"delete {database_path(config.data_dir)} with none running."
        )
    gone = "SELECT count(*) FROM entries WHERE request_key = ?"
    deadline_s = time.monotonic() + _PURGE_S
    left = doomed
    while left := [key for key in left if database.execute(gone, (key,)).fetchone()[0]]:
        if time.monotonic() > deadline_s:
            return _failed(f"{len(left)} entries are still there after {_PURGE_S:.0f} s; see `hyperspace status`")
        time.sleep(0.02)
    print(f"{len(doomed)} deleted. Servers forget what they computed in the last {RECENT_MS // 1000} s by themselves.")
    return 0


def _told(config: Config, keys: list[bytes]) -> bool:
    client = NodeClient(config, "cli", "cache purge")
    try:
        if not client.wait_connected(_CONNECT_S):
            return False
        batches = [keys[at : at + PURGED_KEYS_MAX] for at in range(0, len(keys), PURGED_KEYS_MAX)]
        return all(client.send(PurgeResponses(tuple(batch))) for batch in batches)
    finally:
        client.close()


def _named(database: sqlite3.Connection, prefix: str) -> Entry | str:
    """The only entry whose key starts with `prefix`, or an error message."""
    if not prefix or len(prefix) > 64 or set(prefix.lower()) - set("0123456789abcdef"):
        return f"{prefix!r}: expected a RequestKey, up to 64 hex digits; `hyperspace cache list` shows them"
    found = _entries(database, prefix, limit=2)
    if len(found) == 1:
        return found[0]
    return f"{prefix}: {'several entries begin so: give more digits' if found else 'there is no such entry'}"


def _whole(database: sqlite3.Connection, entry: Entry) -> dict[str, Any]:
    """The whole entry for a JSON object; `intact` says whether its body matches its proof."""
    row = database.execute(_BODY, (entry.request_key,)).fetchone()
    body = (unpacked(row[0]) if row else None) or b""
    intact = decode_proof(entry.proof).response_hash == sha256(body)
    proof = base64.b64encode(entry.proof).decode()
    return {**entry.described(), "intact": intact, "proof": proof, "body": body.decode(errors="replace")}


def _duration(milliseconds: int) -> str:
    seconds = max(milliseconds, 0) // 1000
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _failed(text: str) -> int:
    print(f"hyperspace: {for_terminal(text)}", file=sys.stderr)
    return 1
