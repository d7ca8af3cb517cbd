"""What a request says, as the cache reads it."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from hyperspace_vllm.api.options import ResponseCacheOptions
from hyperspace_vllm.api.request_facts import RequestFacts, facts_of
from hyperspace_vllm.core.response.request_fields import Endpoint

OPTIONS: dict[str, Any] = {"db_path": None, "model_digest": lambda: bytes(32), "client": None, "fleet_secret": b"fleet"}


def facts(
    body: dict[str, Any],
    endpoint: Endpoint = "chat",
    headers: dict[str, str] | None = None,
    **options: Any,
) -> RequestFacts:
    scope = {"headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()]}
    return facts_of(ResponseCacheOptions(**(OPTIONS | options)), endpoint, b"", body, scope)


def test_nothing_changes_a_fact() -> None:
    with pytest.raises(FrozenInstanceError):
        facts({}).tenant = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("body", "endpoint", "headers", "scope"),
    [
        ({}, "chat", {}, "network"),
        ({"cache_salt": "s"}, "chat", {}, "private"),
        ({}, "chat", {"cache-control": "private"}, "private"),
        ({}, "chat", {"cache-control": "no-store"}, "private"),
        ({}, "embeddings", {}, "private"),
    ],
)
def test_an_answer_travels_as_far_as_its_request_allows(
    body: dict[str, Any], endpoint: Endpoint, headers: dict[str, str], scope: str
) -> None:
    assert facts(body, endpoint, headers).reach.scope == scope


def test_a_tenants_answer_stays_and_an_unknown_key_has_no_tenant() -> None:
    keys = ("sk-a", "sk-b")
    known = facts({}, headers={"authorization": "Bearer sk-a"}, api_keys=keys)
    assert (known.tenant or "") != ""
    assert known.reach.scope == "private"
    assert facts({}, headers={"authorization": "Bearer sk-c"}, api_keys=keys).tenant is None


@pytest.mark.parametrize(
    ("endpoint", "body", "streams", "chooses", "wants"),
    [
        ("chat", {}, False, False, False),
        ("chat", {"stream": True}, True, True, False),
        ("completions", {"stream": True, "stream_options": {"include_usage": True}}, True, True, True),
        ("chat", {"stream": False, "stream_options": {"include_usage": True}}, False, False, False),
        ("chat", {"stream": True, "stream_options": "yes"}, True, True, False),
        ("messages", {"stream": True}, True, False, False),
        ("embeddings", {"stream": True}, False, False, False),
    ],
)
def test_only_some_streams_choose_whether_they_end_with_usage(
    endpoint: Endpoint, body: dict[str, Any], streams: bool, chooses: bool, wants: bool
) -> None:
    found = facts(body, endpoint)
    assert (found.streams, found.chooses_usage, found.wants_usage) == (streams, chooses, wants)


def test_a_response_repeats_what_was_not_stored_of_its_request() -> None:
    body = {"metadata": {"a": "b"}, "user": None, "model": "m"}
    assert facts(body, "responses").repeated == {"metadata": {"a": "b"}}
    assert facts(body, "chat").repeated == {}


def test_a_request_that_says_how_it_is_scheduled_is_told_from_others() -> None:
    assert not any(facts({"priority": 0}).served_by())
    assert any(facts({"priority": 1}).served_by())
    assert any(facts({}, headers={"x-data-parallel-rank": "1"}).served_by())
