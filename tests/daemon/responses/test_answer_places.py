"""Whose query is answered next: no peer, and not all strangers together, keep the others waiting."""

import asyncio

from hyperspace_vllm.daemon.responses.answer_places import (
    ANSWERS_MAX,
    OWN_NODE,
    PEER_ANSWERS_MAX,
    STRANGERS_ANSWERS_MAX,
    AnswerPlaces,
    AskingPeer,
)

MEMBERS = [AskingPeer(f"member {number}", True, True) for number in range(20)]
STRANGERS = [AskingPeer(f"stranger {number}", False, False) for number in range(20)]


async def asked(places: AnswerPlaces, *askers: AskingPeer) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(places.take(asker)) for asker in askers]
    await settled()
    return tasks


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def served(tasks: list[asyncio.Task[None]]) -> int:
    return sum(task.done() for task in tasks)


async def cancelled(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_places_are_bounded_for_one_peer_for_all_strangers_and_in_all() -> None:
    places = AnswerPlaces()
    one = await asked(places, *MEMBERS[:1] * 10)
    assert served(one) == PEER_ANSWERS_MAX
    strangers = await asked(places, *STRANGERS)
    assert served(strangers) == STRANGERS_ANSWERS_MAX
    others = await asked(places, *MEMBERS[1:])
    assert served(others) == ANSWERS_MAX - PEER_ANSWERS_MAX - STRANGERS_ANSWERS_MAX
    await cancelled(*one, *strangers, *others)


async def test_peers_with_standing_go_before_strangers_that_came_earlier() -> None:
    places = AnswerPlaces()
    await asked(places, *[OWN_NODE] * ANSWERS_MAX)
    strangers = await asked(places, *STRANGERS)
    members = await asked(places, *MEMBERS[:2])
    places.free(OWN_NODE)
    await settled()
    assert (served(members), served(strangers)) == (1, 0)
    for _ in range(2):
        places.free(OWN_NODE)
    await settled()
    assert (served(members), served(strangers)) == (2, 1)
    await cancelled(*strangers)


async def test_the_turn_of_one_that_gave_up_is_the_next_ones() -> None:
    places = AnswerPlaces()
    await asked(places, *[OWN_NODE] * ANSWERS_MAX)
    for gives_up_late in (False, True):
        first, second = await asked(places, *MEMBERS[:2])
        if gives_up_late:
            places.free(OWN_NODE)  # its turn has come, but it has not heard of it
        await cancelled(first)
        if not gives_up_late:
            places.free(OWN_NODE)
        await asyncio.wait_for(second, 10)
        assert first.cancelled()
        places.free(MEMBERS[1])
        await asked(places, OWN_NODE)
