"""Lookups that find too little room or lose a row, by transcripts."""

from hyperspace_vllm.core.records.limits import MiB
from tests.support.machines.prefix_script import MIXED, Script


def test_a_prefix_longer_than_the_room_is_cut_where_the_room_ends():
    Script().run(f"""
        > want A segments=4
        find-rows 4
        > found memory=1,3 disk=0,2 leased=1 room={2 * MiB}
        load 1  # leased by others: it costs nothing
        load 0
        load 2
        > ready row=1
        > ready row=0
        > ready row=2
        answer 3 disk arena_full rows=3
    """)


def test_a_window_takes_room_for_its_tail_alone():
    # rows: 2i is segment i of the full part, 2i + 1 of the window; an end needs the last two window rows
    Script(MIXED).run(f"""
        > want A segments=6
        find-rows 12
        > found disk=0..11 room={5 * MiB}
        load 0
        load 2
        load 3
        load 4
        load 5
        > ready row=0
        > ready row=2
        > ready row=3
        > ready row=4
        > ready row=5
        answer 3 disk arena_full rows=5
    """)


def test_a_row_without_a_gap_costs_the_end_of_the_prefix_not_all_of_it():
    Script().run("""
        > want A segments=3
        find-rows 3
        > found memory=1,2 disk=0
        load 1
        load 2
        load 0
        > ready row=1
        > ready row=2
        > failed arena_full row=0
        release 2
        load 0
        > ready row=0
        answer 2 disk arena_full rows=2
    """)


def test_a_fetched_row_without_a_gap_makes_do_with_what_is_under_way():
    Script().run("""
        > want A segments=3
        find-rows 3
        > found
        find-providers A rows=3 ms=250
        > offer A m rows=0..2 now=3
        fetch-manifest A m
        > manifest A m rows=0..2 now=8
        fetch A m row=0 0..31
        fetch A m row=1 0..31
        fetch A m row=2 0..31
        > failed arena_full row=1
        release 2
        fetch A m row=1 0..31
        > ready row=2 now=9
        release 2
        > ready row=0
        > ready row=1
        answer 2 network arena_full rows=2
    """)


def test_a_lookup_that_finds_no_room_holds_nothing_and_looks_again_for_a_moment():
    script = Script()
    script.run(f"""
        > want A segments=2
        find-rows 2
        > found disk=0,1 room=0
        > tick now=20
        find-rows 2
        > found memory=0 disk=1 room={MiB} now=21
        load 0
        > ready row=0
        answer 1 memory arena_full rows=1
    """)
    Script().run("""
        > want A segments=1 prefill=100
        find-rows 1
        > found disk=0 room=0
        > tick now=20
        find-rows 1
        > found disk=0 room=0
        > tick now=40
        find-rows 1
        > found disk=0 room=0
        > tick now=50  # half of the prefill is over
        find-rows 1
        > found disk=0 room=0
        answer 0 none arena_full rows=0
    """)


def test_what_peers_have_waits_for_room_too_and_is_no_reason_to_keep_less():
    Script().run(f"""
        > want A segments=2
        find-rows 2
        > found room=0
        find-providers A rows=2 ms=250
        > offer A m rows=0..1 now=3
        > tick now=23
        find-rows 2
        > found room={MiB}
        fetch-manifest A m
        > manifest A m rows=0..1
        fetch A m row=0 0..31
        > ready row=0
        answer 1 network arena_full rows=1
    """)
    Script().run(f"""
        > want A segments=2
        find-rows 2
        > found disk=0 room={MiB}
        find-providers A rows=1 ms=250
        > offer A m rows=1 now=3
        load 0
        > ready row=0
        answer 1 disk hit rows=1
    """)


def test_a_retreat_loads_the_window_rows_that_the_shorter_prefix_needs():
    # rows: 2i is segment i of the full part, 2i + 1 of the window; an end needs the last two window rows
    Script(MIXED).run("""
        > want A segments=5
        find-rows 10
        > found memory=0..5
        find-providers A rows=4 ms=250
        > offer A m rows=6..9
        load 0
        load 2
        load 4
        fetch-manifest A m
        > ready row=0
        > ready row=2
        > ready row=4
        > refused A m untrusted_producer
        load 3
        load 5
        > ready row=3
        > ready row=5
        answer 3 memory failed rows=5
    """)


def test_a_full_arena_ends_the_fetch():
    Script().run("""
        > want A segments=2
        find-rows 2
        > found
        find-providers A rows=2 ms=250
        > offer A m rows=0..1
        fetch-manifest A m
        > manifest A m rows=0..1
        fetch A m row=0 0..31
        fetch A m row=1 0..31
        > ready row=0
        > failed arena_full row=1
        answer 1 network arena_full rows=1
    """)


def test_a_local_row_that_was_evicted_shortens_the_prefix():
    Script().run("""
        > want segments=3
        find-rows 3
        > found memory=0..2
        load 0
        load 1
        load 2
        > ready row=0
        > failed evicted row=1
        answer 1 memory evicted rows=1
    """)
