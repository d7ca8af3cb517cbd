"""KV messages of an engine's scheduler and workers: layouts, staged rows, names of segments, prefix lookups."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import assert_never

from ... import session_lock
from ...core.events.prefix_reading import PrefixReleased, PrefixWanted
from ...core.events.prefix_writing import ClientGone, RequestOver, RowArrived, SegmentKeyKnown
from ...core.events.vocabulary import PrefixEvent
from ...core.local.kv_messages import (
    NO_ENGINE,
    LookupPrefix,
    PrefixAnswer,
    PrefixesInMemory,
    RegisterLayout,
    ReleaseLookup,
    RequestEnded,
    RowStaged,
    SegmentNamed,
    StagingGranted,
    StagingUnused,
    WantStaging,
)
from ...core.local.messages import NodeMessage
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import SegmentKey
from .prefix_lookups import PrefixLookups
from .served import Served
from .session import Session
from .staging import Staging

EngineMessage = (
    RegisterLayout
    | WantStaging
    | RowStaged
    | StagingUnused
    | SegmentNamed
    | RequestEnded
    | LookupPrefix
    | ReleaseLookup
    | PrefixesInMemory
)


class EngineMessages:
    """Turns messages into events of the core, which `submit` takes; without a `kv_cache` they are dropped."""

    def __init__(
        self,
        kv_cache: bool,
        data_dir: Path,
        staging: Staging,
        lookups: PrefixLookups,
        submit: Callable[[PrefixEvent], None],
        served: Served,
        send: Callable[[bytes, NodeMessage], bool],
    ) -> None:
        """`data_dir` holds the sessions' locks."""
        self._kv_cache = kv_cache
        self._data_dir = data_dir
        self._staging = staging
        self._lookups = lookups
        self._submit = submit
        self._served = served
        self._send = send

    def handle(self, session: Session, message: EngineMessage) -> None:
        """Act on a message; `ProtocolViolation`."""
        match message:
            case RegisterLayout(layout, engine):
                session.layout = layout
                session.engine = engine.hex() if engine != NO_ENGINE else ""
                self._served.fingerprint(session.key, layout.fingerprint)
            case WantStaging():
                self._grant(session, message)
            case RowStaged():
                self._accept(session, message)
            case StagingUnused(slab):
                self._staging.give_back(session.key, slab)
            case SegmentNamed(request_id, segment, segment_key, scope):
                self._submit(
                    SegmentKeyKnown(
                        session.known_engine(),
                        request_id,
                        segment,
                        SegmentKey(segment_key),
                        session.registered_layout(),
                        scope != "private",
                    )
                )
            case RequestEnded(request_id):
                if session.engine:
                    self._submit(RequestOver(session.engine, request_id))
            case LookupPrefix():
                self._look_up(session, message)
            case ReleaseLookup(client_lookup):
                lookup = self._lookups.numbers.release(session.route, client_lookup)
                if lookup is not None:
                    self._submit(PrefixReleased(lookup))
            case PrefixesInMemory():
                self._served.prefixes(session.key, message)
            case _:
                assert_never(message)

    def ended(self, session: Session, others: Iterable[Session], vanished: bool) -> None:
        """A session is over; `others` are still here. One that `vanished` may still write to its granted slabs."""
        for lookup in self._lookups.numbers.end(session.route):
            self._submit(PrefixReleased(lookup))
        self._staging.end(session.key, vanished)
        # Only its scheduler names what an engine staged; a new scheduler starts with new requests.
        has_others = any(other.engine == session.engine for other in others)
        if session.engine and (session.role == "scheduler" or not has_others):
            self._submit(ClientGone(session.engine))

    def look_after(self, sessions: Iterable[Session]) -> None:
        """Called periodically: reuse slabs of ended sessions, and grant slabs that did not fit before."""
        self._staging.reclaim(partial(session_lock.look, self._data_dir))
        for session in sessions:
            self._grant_owed(session)

    def _grant(self, session: Session, want: WantStaging) -> None:
        layout = session.registered_layout()
        if all(part.row_bytes != want.row_bytes for part in layout.parts):
            raise ProtocolViolation(f"row_bytes {want.row_bytes}: no part of the layout has such rows")
        wanted = want.count if self._kv_cache else 0
        slabs = self._staging.grant(session.key, want.row_bytes, wanted, layout)
        if not self._send(session.route, StagingGranted(want.row_bytes, slabs)):
            for slab in slabs:
                self._staging.give_back(session.key, slab)
        session.owed[want.row_bytes] = wanted - len(slabs)

    def _grant_owed(self, session: Session) -> None:
        """Grant the slabs that did not fit when the session asked, so that its next prompt has enough."""
        for row_bytes, wanted in session.owed.items():
            slabs = self._staging.grant(session.key, row_bytes, wanted, session.registered_layout())
            if slabs and not self._send(session.route, StagingGranted(row_bytes, slabs)):
                for slab in slabs:
                    self._staging.give_back(session.key, slab)
                continue
            session.owed[row_bytes] = wanted - len(slabs)

    def _accept(self, session: Session, row: RowStaged) -> None:
        layout, engine = session.registered_layout(), session.known_engine()
        if row.part >= len(layout.parts) or row.rank >= layout.ranks:
            raise ProtocolViolation(f"row part {row.part} rank {row.rank}: the layout has no such row")
        if row.slab.length != layout.parts[row.part].row_bytes:
            raise ProtocolViolation(f"row length {row.slab.length}: not that of part {row.part}")
        staged = self._staging.accept(session.key, row.slab)
        self._submit(
            RowArrived(
                engine,
                row.request_id,
                row.segment,
                row.part,
                row.rank,
                staged,
                row.slab.length,
                layout,
            )
        )

    def _look_up(self, session: Session, want: LookupPrefix) -> None:
        layout = session.registered_layout()
        lookup = self._lookups.numbers.begin(session.route, want.lookup) if self._kv_cache else None
        if lookup is None:
            reason = "busy" if self._kv_cache else "off"
            self._send(session.route, PrefixAnswer(want.lookup, 0, (), "none", "", reason))
            return
        self._submit(
            PrefixWanted(
                lookup,
                layout,
                tuple(SegmentKey(key) for key in want.segment_keys),
                want.start_token,
                want.prefill_ms,
                want.deadline_ms,
                want.scope != "private",
            )
        )
