"""Tasks of lookups: what ends with a lookup, what a bug costs, and what is waited for at the end."""

import asyncio

from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.lookup_tasks import LookupTasks


async def forever() -> None:
    await asyncio.Event().wait()


def bugs(metrics: Metrics) -> float:
    name, labels = "hyperspace_failures_total", {"layer": "l1", "reason": "bug"}
    return metrics.registry.get_sample_value(name, labels) or 0.0


async def test_a_lookups_tasks_end_with_it_and_others_go_on() -> None:
    tasks = LookupTasks("l1", Metrics())
    mine, others, free = tasks.start(1, forever()), tasks.start(2, forever()), tasks.spawn(forever())
    await asyncio.sleep(0)
    tasks.end(1)
    await asyncio.wait([mine])
    assert mine.cancelled()
    assert tasks.lookups == [2]
    assert not others.done()
    assert not free.done()
    await tasks.close(0)
    assert others.cancelled()
    assert free.cancelled()


async def test_the_task_that_ends_its_lookup_goes_on() -> None:
    tasks, done = LookupTasks("l1", Metrics()), []

    async def end() -> None:
        tasks.end(1)
        await asyncio.sleep(0)
        done.append(True)

    await tasks.start(1, end())
    assert done == [True]


async def test_a_bug_is_counted_and_reported_and_costs_no_other_task() -> None:
    metrics, reported = Metrics(), []
    tasks = LookupTasks("l1", metrics)

    async def fail() -> None:
        raise ValueError("a bug")

    other = tasks.spawn(forever())
    await tasks.start(1, fail(), lambda: reported.append("bug"))
    assert reported == ["bug"]
    assert bugs(metrics) == 1
    assert not other.done()
    await tasks.close(0)


async def test_what_ends_soon_is_waited_for() -> None:
    tasks, done = LookupTasks("l1", Metrics()), []

    async def soon() -> None:
        await asyncio.sleep(0.01)
        done.append(True)

    tasks.spawn(soon())
    await tasks.close(60)
    assert done == [True]
