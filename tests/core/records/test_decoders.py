"""Arbitrary bytes and damaged valid messages through every decoder: a value or its documented error, nothing else.

`make fuzz` runs the same functions for longer, and guided by coverage where atheris is installed.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz_decoders import mutated
from tests.support.fuzz.decoders import TARGETS, run

decoders = pytest.mark.parametrize("name", TARGETS)
few = settings(deadline=None, max_examples=60)  # a busy machine is no bug of a decoder


@decoders
def test_samples_and_what_once_broke_a_decoder_no_longer_do(name: str) -> None:
    for sample in TARGETS[name][1]:
        run(name, sample)


@decoders
@few
@given(raw=st.binary(max_size=600))
def test_no_bytes_break_a_decoder(name: str, raw: bytes) -> None:
    run(name, raw)


@decoders
@few
@given(seed=st.integers(0, 1 << 32))
def test_no_damaged_message_breaks_a_decoder(name: str, seed: int) -> None:
    rng = random.Random(seed)
    run(name, mutated(rng, rng.choice(TARGETS[name][1])))
