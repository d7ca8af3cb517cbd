"""What tests wait with says what did not happen."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.until import until, until_async


def test_the_first_true_value_is_returned() -> None:
    values: Iterator[int | list[int] | None] = iter([0, None, [], 3, 4])
    assert until(lambda: next(values)) == 3


def test_a_condition_that_never_holds_fails_with_its_source_and_its_last_value() -> None:
    with pytest.raises(TimeoutError, match=r"lambda: 2 - 2.*: not within 0.01 s; the last value was 0"):
        until(lambda: 2 - 2, 0.01)
    with pytest.raises(TimeoutError, match=r"^a miracle: not within 0 s; the last value was None"):
        until(lambda: None, 0, "a miracle")


async def test_while_one_task_waits_the_others_go_on() -> None:
    happened = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, happened.set)
    assert await until_async(happened.is_set)


async def test_what_a_condition_awaits_counts_and_is_cut_off_at_the_deadline() -> None:
    values = iter([0, 5])

    async def value() -> int:
        return next(values)

    assert await until_async(value) == 5
    with pytest.raises(TimeoutError, match=r"^no end: not within 0.01 s; the last value was 'still awaited'"):
        await until_async(lambda: asyncio.sleep(60, 1), 0.01, "no end")
