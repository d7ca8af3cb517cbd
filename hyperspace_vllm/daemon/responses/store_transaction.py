"""One transaction of the response database: entries, their questions, hits, and deletions."""

import sqlite3
from collections import Counter
from math import log2
from typing import Protocol, assert_never

from nacl.signing import SigningKey

from ...core.local.similar_messages import Question
from ...core.records.ids import NetworkId, RequestKey
from ...core.records.limits import CLOCK_SKEW_MS
from ...core.response.cache_proof import make_proof
from ...core.response.similar.match_error import KINDS_MAX, WINDOW
from ...response_db import Embedded, packed
from .store_changes import PROOF_SIGNER, ServableEntry, StoreChanges
from .store_tasks import Asked, Checked, Computed, Drop, Fetched, Purge, StoreTask, task_bytes

_HALF_LIFE_MS = 3_600_000  # of popularity, where entries are weighed against each other

_SIGNED_BY = f"substr(proof, {PROOF_SIGNER.start + 1}, 32) = ?"

_INSERT = """
INSERT INTO entries (request_key, proof, computed_at_ms, expires_at_ms, size, last_used_ms, hits, scope, worth_ms)
VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?)
"""

_TOUCH = """
UPDATE entries SET hits = hits + ?1, last_used_ms = ?2, worth_ms = worth(hits + ?1, ?2) WHERE request_key = ?3
"""

_INSERT_QUESTION = """
INSERT INTO questions (id, partition, canonical_key, question, embedder, vectors) VALUES (?, ?, ?, ?, ?, ?)
"""

_WITHOUT_QUESTION = """
SELECT id FROM entries WHERE request_key = ? AND NOT EXISTS (SELECT 1 FROM questions WHERE questions.id = entries.id)
"""
_RAISE_FLOOR = "UPDATE questions SET floor = ?2 WHERE id = (SELECT id FROM entries WHERE request_key = ?1)"


class Signer(Protocol):
    """The part of the node's identity that the store uses."""

    @property
    def signing_key(self) -> SigningKey:
        """The node's Ed25519 key."""


def worth(hits: int, last_used_ms: int) -> int:
    """The time of last use at which an entry without hits is worth as much: each doubling of hits is a half-life."""
    return last_used_ms + round(_HALF_LIFE_MS * log2(1 + hits))


class StoreTransaction:
    """One transaction on `database`, at one moment. `changes` is what others must hear of once it is committed."""

    def __init__(
        self, database: sqlite3.Connection, identity: Signer, network: NetworkId, ttl_ms: int, now_ms: int
    ) -> None:
        """No entry lives longer than `ttl_ms`."""
        self._database = database
        self._identity = identity
        self._network = network
        self._ttl_ms = ttl_ms
        self.now_ms = now_ms
        self.changes = StoreChanges()
        self.counts: Counter[str] = Counter()  # stored, fetched, purged, expired, evicted

    def perform(self, task: StoreTask) -> None:
        """Perform a task."""
        match task:
            case Computed():
                self._insert_computed(task)
                self.counts["stored"] += 1
            case Fetched():
                self.counts["fetched"] += self._insert_fetched(task)
            case Purge(keys):
                self.counts["purged"] += sum(self._delete("request_key = ?", key) for key in keys)
            case Asked():
                self._attach(task)
            case Checked():
                self._note_check(task)
            case Drop(proof, all_of_signer):
                where, value = (_SIGNED_BY, proof[PROOF_SIGNER]) if all_of_signer else ("proof = ?", proof)
                self.counts["purged"] += self._delete(where, value)
            case _:
                assert_never(task)

    def touch(self, touched: Counter[bytes]) -> None:
        """Count hits."""
        self._database.executemany(_TOUCH, [(hits, self.now_ms, key) for key, hits in touched.items()])

    def expire(self, clock_was_set_back: bool) -> None:
        """Delete what has expired, and what was computed while the clock was ahead of now."""
        self.counts["expired"] += self._delete("expires_at_ms <= ?", self.now_ms)
        if clock_was_set_back:
            self.counts["expired"] += self._delete("computed_at_ms > ?", self.now_ms + CLOCK_SKEW_MS)

    def evict(self, quota_bytes: int) -> None:
        """Delete the entries of the least worth until the rest fit the quota."""
        excess = totals(self._database)["bytes"] - quota_bytes
        doomed: list[int] = []
        for entry, size in self._database.execute("SELECT id, size FROM entries ORDER BY worth_ms, id"):
            if excess <= 0:
                break
            doomed.append(entry)
            excess -= size
        self.counts["evicted"] += sum(self._delete("id = ?", entry) for entry in doomed)

    def _insert_computed(self, task: Computed) -> None:
        message, now_ms = task.message, self.now_ms
        key = RequestKey(message.request_key)
        proof = make_proof(
            self._identity.signing_key,
            self._network,
            key,
            message.body,
            message.model_digest,
            message.engine_version,
            now_ms,
        )
        expires_at_ms = now_ms + min(self._ttl_ms, message.ttl_ms)
        self._delete("request_key = ?", key)
        body = packed(message.body)
        size = task_bytes(task) - len(message.body) + len(body)
        number = self._insert((key, proof.encode(), now_ms, expires_at_ms, size, now_ms, message.scope, now_ms), body)
        if message.question is not None:
            self._insert_question(number, message.question, task.embedded)
        if message.scope != "private" and expires_at_ms > now_ms:
            self.changes.stored(ServableEntry(proof.request_hash, expires_at_ms, True))

    def _insert_fetched(self, task: Fetched) -> bool:
        """Whether it was stored: not if it has expired, or if the existing entry is no older."""
        query = "SELECT 1 FROM entries WHERE request_key = ? AND computed_at_ms BETWEEN ? AND ? AND expires_at_ms > ?"
        when = (task.computed_at_ms, self.now_ms + CLOCK_SKEW_MS, self.now_ms)
        newer_here = self._database.execute(query, (task.request_key, *when)).fetchone()
        if newer_here or task.expires_at_ms <= self.now_ms:
            return False
        self._delete("request_key = ?", task.request_key)
        body = packed(task.body)
        values = (
            task.request_key,
            task.proof,
            task.computed_at_ms,
            task.expires_at_ms,
            task_bytes(task) - len(task.body) + len(body),
            self.now_ms,
            task.scope,
            self.now_ms,
        )
        self._insert(values, body)
        if task.scope != "private":
            self.changes.stored(ServableEntry(task.proof[:32], task.expires_at_ms, False))
        return True

    def _insert(self, values: tuple[object, ...], body: bytes) -> int:
        """The new entry's id."""
        cursor = self._database.execute(_INSERT, values)
        self._database.execute("INSERT INTO bodies (id, body) VALUES (?, ?)", (cursor.lastrowid, body))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _delete(self, where: str, value: int | bytes) -> int:
        """Delete the entries that `where`, a condition of this module, selects; how many."""
        shareable = "SELECT CAST(request_hash AS BLOB) FROM entries WHERE scope <> 'private' AND"
        for (hash_,) in self._database.execute(f"{shareable} {where}", (value,)):
            self.changes.gone(hash_)
        return self._database.execute(f"DELETE FROM entries WHERE {where}", (value,)).rowcount

    def _insert_question(self, entry: int, question: Question, embedded: Embedded | None) -> None:
        named = embedded or Embedded("", b"")
        asked = (entry, question.partition, question.canonical_key, question.text)
        self._database.execute(_INSERT_QUESTION, (*asked, named.embedder or None, named.vectors or None))

    def _attach(self, task: Asked) -> None:
        """Give an entry that has none its question."""
        row = self._database.execute(_WITHOUT_QUESTION, (task.request_key,)).fetchone()
        if row is not None:
            size = task_bytes(task)
            self._insert_question(row[0], task.question, task.embedded)
            self._database.execute("UPDATE entries SET size = size + ? WHERE id = ?", (size, row[0]))
            self._database.execute("UPDATE totals SET bytes = bytes + ?", (size,))

    def _note_check(self, check: Checked) -> None:
        wrong = check.floor is not None
        if check.kind:
            insert = "INSERT INTO checks (kind, wrong) VALUES (?, ?)"
            number = self._database.execute(insert, (check.kind, wrong)).lastrowid
            self._database.execute("DELETE FROM checks WHERE id <= ? - ?", (number, KINDS_MAX * WINDOW))
        if wrong:
            self._database.execute(_RAISE_FLOOR, (check.request_key, check.floor))


def totals(database: sqlite3.Connection) -> dict[str, int]:
    """The database's entries and their bytes."""
    entries, size = database.execute("SELECT entries, bytes FROM totals").fetchone()
    return {"entries": entries, "bytes": size}
