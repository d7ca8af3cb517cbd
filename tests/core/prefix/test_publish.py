"""From staged rows to objects: joined in either order, kept once, grouped, bounded."""

import pytest

from hyperspace_vllm.core.events.node_state import Tick
from hyperspace_vllm.core.events.prefix_writing import (
    ClientGone,
    DropStaged,
    EncodeObject,
    KeepRow,
    ObjectEncoded,
    ObjectFailed,
    RequestOver,
    RowArrived,
    SegmentKeyKnown,
    UnpinRows,
)
from hyperspace_vllm.core.events.vocabulary import PrefixEffect
from hyperspace_vllm.core.prefix import publish
from hyperspace_vllm.core.prefix.publish import (
    ENCODE_QUEUE_MAX,
    ENCODE_TIMEOUT_MS,
    IDLE_MS,
    OVER_GRACE_MS,
    STAGED_ROWS_MAX,
    UNNAMED_MS,
    Publisher,
)
from hyperspace_vllm.core.records.ids import ManifestDigest, SegmentKey, row_key
from hyperspace_vllm.core.records.layout import Layout, Part

ONE = Layout(b"f" * 32, 256, (Part(0, 1000),), 1)
FOUR = Layout(b"g" * 32, 256, (Part(0, 1000), Part(512, 3000)), 2)


def key(segment: int) -> SegmentKey:
    return SegmentKey(segment.to_bytes(32, "big"))


class Engine:
    """Stages and names rows of one publisher; `kept`, `dropped` and `encoded` collect what it decided."""

    def __init__(self, layout: Layout = ONE) -> None:
        self.publisher = Publisher()
        self.layout = layout
        self.now = 0
        self.kept: dict[int, bytes] = {}
        self.dropped: dict[int, str] = {}
        self.encoded: list[EncodeObject] = []
        self.pinned: set[bytes] = set()
        self.next_staged = 0

    def tell(self, event: publish.PublishEvent) -> list[PrefixEffect]:
        effects = self.publisher.handle(event, self.now)
        for effect in effects:
            match effect:
                case KeepRow():
                    assert effect.staged not in self.kept
                    assert effect.staged not in self.dropped
                    self.kept[effect.staged] = effect.row_key
                    self.pinned.add(effect.row_key)
                case UnpinRows():
                    self.pinned.difference_update(effect.row_keys)
                case DropStaged():
                    assert effect.staged not in self.kept
                    assert effect.staged not in self.dropped
                    self.dropped[effect.staged] = effect.reason
                case EncodeObject():
                    self.encoded.append(effect)
        return effects

    def stage(self, segment: int, part: int = 0, rank: int = 0, request: str = "r", length: int = 0) -> int:
        self.next_staged += 1
        size = length or self.layout.parts[part].row_bytes
        self.tell(RowArrived("c", request, segment, part, rank, self.next_staged, size, self.layout))
        return self.next_staged

    def name(self, segment: int, request: str = "r", shareable: bool = True) -> None:
        self.tell(SegmentKeyKnown("c", request, segment, key(segment), self.layout, shareable))

    def over(self, request: str = "r") -> None:
        self.tell(RequestOver("c", request))

    def wait(self, ms: int) -> None:
        self.now += ms
        while (due := self.publisher.next_deadline_ms()) is not None and due <= self.now:
            self.tell(Tick())
            assert self.publisher.next_deadline_ms() != due


@pytest.mark.parametrize("named_first", [True, False])
def test_a_row_and_its_name_join_in_either_order(named_first: bool) -> None:
    engine = Engine()
    for named in (True, False) if named_first else (False, True):
        if named:
            engine.name(0)
        else:
            engine.stage(0)
    engine.over()
    assert engine.kept == {1: row_key(key(0), 0, 0)}
    assert engine.encoded == [EncodeObject(1, ONE, (row_key(key(0), 0, 0),), 1000, True)]


def test_a_segment_is_encoded_when_all_its_parts_and_ranks_are_here_one_object_each() -> None:
    engine = Engine(FOUR)
    for segment in range(3):
        engine.name(segment)
        for part in range(2):
            for rank in range(2):
                if (segment, part, rank) != (1, 1, 1):
                    engine.stage(segment, part, rank)
    engine.over()
    assert len(engine.kept) == 11
    assert not engine.encoded  # the missing row may still be on its way
    engine.wait(IDLE_MS)
    engine.publisher.handle(ObjectEncoded(1, ManifestDigest(bytes(32))), engine.now)
    engine.wait(OVER_GRACE_MS)
    assert [len(encode.row_keys) for encode in engine.encoded] == [2, 2]
    assert [encode.length for encode in engine.encoded] == [1000, 1000]
    assert engine.encoded[0].row_keys == (row_key(key(0), 0, 0), row_key(key(2), 0, 0))
    assert engine.publisher.skipped == {"incomplete": 3}


def test_rows_are_grouped_by_32_in_the_order_of_their_segments() -> None:
    engine = Engine()
    for segment in reversed(range(40)):
        engine.stage(segment)
    for segment in range(40):
        engine.name(segment)
    assert [len(encode.row_keys) for encode in engine.encoded] == [32]
    engine.over()
    assert [len(encode.row_keys) for encode in engine.encoded] == [32, 8]
    rows = [row for encode in engine.encoded for row in encode.row_keys]
    assert rows == [row_key(key(segment), 0, 0) for segment in range(40)]


def test_a_pause_ends_an_object() -> None:
    engine = Engine()
    engine.name(0)
    engine.stage(0)
    engine.wait(IDLE_MS - 1)
    assert not engine.encoded
    engine.wait(1)
    assert len(engine.encoded) == 1


def test_private_rows_go_into_objects_of_their_own() -> None:
    engine = Engine()
    for segment in range(4):
        engine.name(segment, shareable=segment % 2 == 0)
        engine.stage(segment)
    engine.over()
    assert sorted((encode.shareable, len(encode.row_keys)) for encode in engine.encoded) == [(False, 2), (True, 2)]


def test_known_rows_are_dropped_and_not_encoded_again() -> None:
    engine = Engine()
    for request in ("r", "s"):
        for segment in range(2):
            engine.name(segment, request)
            engine.stage(segment, request=request)
        engine.over(request)
    assert engine.dropped == {3: "known", 4: "known"}
    assert len(engine.encoded) == 1


def test_what_was_private_is_encoded_again_when_it_may_be_shared() -> None:
    engine = Engine()
    for request, shareable in (("r", False), ("s", True), ("t", False)):
        engine.name(0, request, shareable)
        engine.stage(0, request=request)
        engine.over(request)
    assert [encode.shareable for encode in engine.encoded] == [False, True]
    assert engine.dropped == {3: "known"}


def test_rows_that_a_lookup_did_not_find_are_news_again() -> None:
    engine = Engine()
    engine.name(0)
    engine.stage(0)
    engine.publisher.forget([row_key(key(0), 0, 0)])
    engine.name(0, "s")
    engine.stage(0, request="s")
    assert len(engine.kept) == 2


def test_unnamed_rows_go_when_their_request_is_over_named_ones_may_still_come() -> None:
    engine = Engine()
    unnamed = engine.stage(1)
    engine.name(0)
    engine.over()
    assert engine.dropped == {unnamed: "unnamed"}
    late, later = engine.stage(0), engine.stage(2)
    assert engine.kept.keys() == {late}
    assert engine.dropped[later] == "unnamed"
    engine.wait(OVER_GRACE_MS)
    assert len(engine.encoded) == 1


def test_rows_that_are_never_named_go_after_a_while() -> None:
    engine = Engine()
    staged = engine.stage(0)
    engine.wait(UNNAMED_MS)
    assert engine.dropped == {staged: "unnamed"}
    engine.wait(UNNAMED_MS)
    assert engine.publisher.next_deadline_ms() is None


def test_a_client_that_is_gone_leaves_its_named_rows_only() -> None:
    engine = Engine()
    unnamed = engine.stage(1)
    engine.name(0)
    engine.stage(0)
    engine.tell(ClientGone("d"))
    assert not engine.dropped
    engine.tell(ClientGone("c"))
    assert engine.dropped == {unnamed: "client_gone"}
    assert len(engine.encoded) == 1
    engine.wait(ENCODE_TIMEOUT_MS)
    assert engine.publisher.next_deadline_ms() is None


@pytest.mark.parametrize(("part", "rank", "length"), [(1, 0, 1000), (0, 1, 1000), (0, 0, 999)])
def test_rows_that_the_layout_does_not_have_are_dropped(part: int, rank: int, length: int) -> None:
    engine = Engine()
    engine.name(0)
    assert engine.dropped == {engine.stage(0, part, rank, length=length): "mismatch"}


def test_a_row_that_is_staged_twice_is_dropped_the_second_time() -> None:
    engine = Engine(FOUR)
    engine.stage(0)
    assert engine.dropped == {engine.stage(0): "duplicate"}
    engine.name(0)
    assert engine.dropped[engine.stage(0)] == "duplicate"


def test_too_many_unnamed_rows_push_out_the_oldest() -> None:
    engine = Engine()
    first = engine.stage(0)
    for segment in range(1, STAGED_ROWS_MAX):
        engine.stage(segment)
    assert not engine.dropped
    engine.stage(0, request="s")
    assert engine.dropped == {first: "full"}


def test_too_many_names_without_rows_push_out_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "SEGMENTS_MAX", 3)
    engine = Engine()
    for segment in range(4):
        engine.name(segment)
    engine.stage(3)
    engine.stage(0)
    assert list(engine.kept) == [1]


def test_two_objects_are_encoded_at_once_and_the_queue_loses_its_oldest() -> None:
    engine = Engine()
    count = 2 + ENCODE_QUEUE_MAX + 1
    for number in range(count):
        engine.name(number, f"r{number}")
        engine.stage(number, request=f"r{number}")
        engine.over(f"r{number}")
    assert [encode.object_id for encode in engine.encoded] == [1, 2]
    assert engine.publisher.skipped == {"encode_queue_full": 1}
    engine.tell(ObjectEncoded(1, ManifestDigest(bytes(32))))
    engine.tell(ObjectFailed(2, "disk_full"))
    assert [encode.object_id for encode in engine.encoded] == [1, 2, 4, 5]
    assert engine.publisher.skipped == {"encode_queue_full": 1, "disk_full": 1}
    engine.name(1, "again")
    engine.stage(1, request="again")
    assert len(engine.kept) == count + 1  # what was not stored is no longer known


def test_kept_rows_stay_until_they_are_stored() -> None:
    engine = Engine()
    for segment in range(3):
        engine.name(segment)
        engine.stage(segment)
    engine.over()
    assert engine.pinned == {row_key(key(segment), 0, 0) for segment in range(3)}
    engine.tell(ObjectEncoded(1, ManifestDigest(bytes(32))))
    assert not engine.pinned


@pytest.mark.parametrize("fault", ["failed", "timeout", "queue_full", "incomplete", "request_over", "client_gone"])
def test_kept_rows_that_are_never_stored_do_not_stay_for_ever(fault: str) -> None:
    engine = Engine(FOUR if fault in ("incomplete", "request_over", "client_gone") else ONE)
    for number in range(3 + ENCODE_QUEUE_MAX if fault == "queue_full" else 1):
        engine.name(number, f"r{number}")
        engine.stage(number, request=f"r{number}")
        if engine.layout is ONE:
            engine.over(f"r{number}")
    match fault:
        case "failed":
            engine.tell(ObjectFailed(1, "disk_full"))
        case "timeout":
            engine.wait(ENCODE_TIMEOUT_MS)
        case "queue_full":
            assert row_key(key(2), 0, 0) not in engine.pinned
            return
        case "incomplete":
            assert len(engine.pinned) == 1
            engine.wait(UNNAMED_MS)
        case "request_over":
            engine.over("r0")
            engine.wait(OVER_GRACE_MS)
        case "client_gone":
            engine.tell(ClientGone("c"))
    assert not engine.pinned


def test_an_encoding_that_never_ends_does_not_block_others() -> None:
    engine = Engine()
    for number in range(3):
        engine.name(number, f"r{number}")
        engine.stage(number, request=f"r{number}")
        engine.over(f"r{number}")
    engine.wait(ENCODE_TIMEOUT_MS)
    assert [encode.object_id for encode in engine.encoded] == [1, 2, 3]
    assert engine.publisher.skipped == {"encode_timeout": 2}
