import pytest

from hyperspace_vllm.arena_size import MOST_BYTES, arena_bytes, memory_bytes
from hyperspace_vllm.core.records.limits import GiB, MiB


@pytest.mark.parametrize(
    ("prompt_bytes", "memory", "expected"),
    [
        (100 * MiB, 64 * GiB, GiB),  # four of them are less than what an arena has at least
        (GiB, 64 * GiB, 4 * GiB),
        (40 * GiB, 64 * GiB, 8 * GiB),  # an eighth of the memory
        (40 * GiB, 2048 * GiB, MOST_BYTES),
        (None, 64 * GiB, 4 * GiB),
        (None, 1024 * GiB, MOST_BYTES),
        (None, 4 * GiB, GiB // 2),  # small machines give an eighth, however small
        (GiB, 4 * GiB, GiB // 2),
        (None, 1 * MiB, MiB),
    ],
)
def test_an_arena_holds_four_prompts_within_an_eighth_of_the_memory(
    prompt_bytes: int | None, memory: int, expected: int
) -> None:
    assert arena_bytes(prompt_bytes, memory) == expected


def test_this_machines_memory_is_known() -> None:
    assert 256 * MiB < memory_bytes() < 1 << 50
