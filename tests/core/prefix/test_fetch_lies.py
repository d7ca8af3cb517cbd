"""Lookups among peers that lie or lack what they offer, by transcripts."""

import pytest

from tests.support.machines.prefix_script import Script


def test_garbage_is_charged_and_its_sender_not_asked_again():
    Script().run("""
        > want A B segments=2
        find-rows 2
        > found
        find-providers A B rows=2 ms=250
        > offer A m rows=0..1 rtt=1
        fetch-manifest A m
        > offer B m rows=0..1 rtt=40
        > manifest A m rows=0..1
        fetch A m row=0 0..31
        fetch A m row=1 0..31
        > chunks A row=0 columns=0..3 now=5
        > stalled A bad_digest row=0 now=6
        charge A bad_digest
        fetch B m row=0 4..31
        fetch B m row=1 0..31
        > ready row=0 now=20
        > ready row=1 now=30
        answer 2 network hit rows=2
    """)


def test_columns_that_a_holder_lacks_are_replaced_by_others():
    Script().run("""
        > want A segments=1
        find-rows 1
        > found
        find-providers A rows=1 ms=250
        > offer A m rows=0
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0..27
        > stalled A not_here row=0
        fetch A m row=0 32..35
        > stalled A not_here row=0
        fetch A m row=0 36..39
        > ready row=0
        answer 1 network hit rows=1
    """)


def test_too_many_lost_columns_are_a_miss_at_once():
    Script().run("""
        > want A segments=1
        find-rows 1
        > found
        find-providers A rows=1 ms=250
        > offer A m rows=0 columns=0..32
        fetch-manifest A m
        > manifest A m rows=0
        fetch A m row=0 0..31
        > chunks A row=0 columns=0..29
        > stalled A not_here row=0
        answer 0 none failed rows=0
    """)


@pytest.mark.parametrize("lie", ["rows=1", "rows=0 length=9", "rows=0 fingerprint=g", "rows=0 chunk=4194560"])
def test_an_offer_that_its_manifest_contradicts_is_charged(lie):
    Script().run(f"""
        > want A B segments=2
        find-rows 2
        > found memory=1
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=1
        load 1
        fetch-manifest A m
        > offer B n rows=0 rtt=9
        > manifest A m {lie}
        charge A false_offer
        fetch-manifest B n
    """)


def test_a_false_tag_is_charged_to_the_producer_and_not_to_who_offers_the_manifest():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0
        fetch-manifest A m
        > offer B n rows=0
        > refused A m bad_tag producer=P
        charge P bad_tag
        fetch-manifest B n
        > refused B n bad_tag producer=B
        charge B bad_tag
        answer 0 none failed rows=0
    """)


def test_a_refused_manifest_is_asked_of_the_next_who_offers_it():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0
        fetch-manifest A m
        > offer B m rows=0
        > refused A m forged
        charge A forged
        fetch-manifest B m
        > manifest B m rows=0
        fetch B m row=0 0..31
        > ready row=0
        answer 1 network hit rows=1
    """)


def test_a_condemned_object_is_given_up_for_another():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=1
        fetch-manifest A m
        > offer B n rows=0 rtt=9
        > manifest A m rows=0
        fetch A m row=0 0..31
        > failed condemned row=0
        fetch-manifest B n
        > manifest B n rows=0
        fetch B n row=0 0..31
        > failed condemned row=0
        answer 0 none failed rows=0
    """)


def test_a_manifest_that_raced_with_a_condemned_one_is_asked_again():
    Script().run("""
        > want A B segments=1
        find-rows 1
        > found
        find-providers A B rows=1 ms=250
        > offer A m rows=0 rtt=1
        fetch-manifest A m
        > offer B n rows=0 rtt=9
        > manifest A m rows=0
        fetch A m row=0 0..31
        > tick now=90
        fetch-manifest B n
        > manifest B n rows=0 now=100
        fetch B n row=0 0..31
        > chunks A row=0 columns=0..31 now=110
        > failed condemned row=0
        fetch B n row=0 0..31
        > ready row=0 now=120
        answer 1 network hit rows=1
    """)


def test_rows_that_the_first_holder_cannot_complete_wait_for_peers_that_may_still_answer():
    Script().run("""
        > want A B segments=2 prefill=10000
        find-rows 2
        > found
        find-providers A B rows=2 ms=500
        > offer A m rows=0..1 now=2
        fetch-manifest A m
        > refused A m forged now=5
        charge A forged
        > offer B n rows=0..1 now=40
        fetch-manifest B n
        > manifest B n rows=0..1
        fetch B n row=0 0..31
        fetch B n row=1 0..31
        > ready row=0
        > ready row=1
        answer 2 network hit rows=2
    """)
    Script().run("""
        > want A B segments=2 prefill=2000
        find-rows 2
        > found memory=0
        find-providers A B rows=1 ms=50
        > offer A m rows=1 now=2
        load 0
        fetch-manifest A m
        > ready row=0 now=3
        > refused A m forged now=5
        charge A forged
        > tick now=50
        answer 1 memory failed rows=1
    """)
