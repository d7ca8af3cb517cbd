"""The vocabulary of a node: one Event, one Effect, and beside each effect the events that answer it."""

import dataclasses
import importlib
import pkgutil
import re
from typing import get_args

import pytest

from hyperspace_vllm.core import events
from hyperspace_vllm.core.events.known_peers import KvEndpoint
from hyperspace_vllm.core.events.prefix_reading import RowOffer
from hyperspace_vllm.core.events.vocabulary import Effect, Event

PARTS = {RowOffer, KvEndpoint}  # of events and effects
EVENTS, EFFECTS = set(get_args(Event)), set(get_args(Effect))


def defined() -> set[type]:
    names = [found.name for found in pkgutil.iter_modules(events.__path__)]
    modules = [importlib.import_module(f"{events.__name__}.{name}") for name in names]
    classes = [each for module in modules for each in vars(module).values() if isinstance(each, type)]
    return {each for each in classes if dataclasses.is_dataclass(each) and each.__module__.startswith(events.__name__)}


def test_every_class_of_the_room_is_an_event_or_an_effect_and_has_a_name_of_its_own() -> None:
    assert defined() == EVENTS | EFFECTS | PARTS
    assert EVENTS.isdisjoint(EFFECTS)
    assert len({each.__name__ for each in defined()}) == len(defined())


@pytest.mark.parametrize("effect", sorted(EFFECTS, key=repr))
def test_an_effect_names_the_events_that_answer_it_and_they_are_in_its_file(effect: type) -> None:
    says = " ".join((effect.__doc__ or "").split())
    answers = {name for pair in re.findall(r"[Aa]nswered by (\w+)(?: or (\w+))?", says) for name in pair if name}
    here = {each.__name__ for each in EVENTS if each.__module__ == effect.__module__}
    assert answers <= here
    assert answers or "Not answered" in says
