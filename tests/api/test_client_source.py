"""Which clients count as one: by their network, whatever a header says that the operator trusts no proxy for."""

from typing import Any

import httpx
import pytest
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from hyperspace_vllm.api.client_source import names_proxies, source_of
from hyperspace_vllm.core.local.response_cache_messages import SOURCE_BYTES_MAX
from tests.support.cached_server import served


def source(client: object, forwarded: str = "", trusted: bool = False) -> bytes:
    headers = [(b"x-forwarded-for", forwarded.encode())] if forwarded else []
    return source_of({"client": client, "headers": headers}, trusted)


HERE = source(("127.0.0.1", 1))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("10.1.2.3", 1), ("10.1.2.200", 2), True),
        (("10.1.2.3", 1), ("10.1.3.3", 1), False),
        (("2001:db8:1:2::3", 1), ("2001:db8:1:ffff::9", 1), True),
        (("2001:db8:1::3", 1), ("2001:db8:2::3", 1), False),
        (("::ffff:10.1.2.3", 1), ("10.1.2.9", 1), True),
        (("127.0.0.1", 1), ("127.9.8.7", 1), True),
        (("127.0.0.1", 1), ("::1", 1), True),
        (("127.0.0.1", 1), ("::ffff:127.5.0.1", 1), True),
        (("127.0.0.1", 1), ("10.1.2.3", 1), False),
        (("a name", 1), ("another", 1), True),
        (("a name", 1), ("127.0.0.1", 1), True),
        (None, ("", 0), True),
        (None, ("127.0.0.1", 1), True),
    ],
)
def test_a_source_is_what_one_client_cannot_be_twice(one: object, other: object, same: bool) -> None:
    assert (source(one) == source(other)) is same
    assert len(source(one)) <= SOURCE_BYTES_MAX


@pytest.mark.parametrize(
    ("client", "forwarded", "counts_as_this_host"),
    [
        ("198.51.100.7", "198.51.100.7", True),
        ("198.51.100.7", "198.51.100.7:5", True),
        ("198.51.100.7", "203.0.113.9, 198.51.100.7", True),
        ("2001:db8::1", "[2001:DB8::1]:5", True),
        ("2001:db8::1", "2001:db8:0::1", True),
        ("198.51.100.7", "203.0.113.9", False),  # not what the server took: the address of the connection
        ("198.51.100.7", "", False),
    ],
)
def test_what_a_header_names_counts_only_where_the_operator_names_proxies(
    client: str, forwarded: str, counts_as_this_host: bool
) -> None:
    assert (source((client, 5), forwarded) == HERE) is counts_as_this_host
    assert source((client, 5), forwarded, trusted=True) == source((client, 5)) != HERE


@pytest.mark.parametrize(
    ("allowed", "names"),
    [(None, False), ("", False), ("*", False), ("10.0.0.1, *", False), ("10.0.0.1", True), ("10.0.0.0/8,::1", True)],
)
def test_a_server_that_trusts_any_client_names_no_proxy(allowed: str | None, names: bool) -> None:
    assert names_proxies(allowed) is names


@pytest.mark.io
async def test_a_client_on_this_host_is_one_source_whatever_it_says_to_uvicorn() -> None:
    seen: list[dict[str, Any]] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append(scope)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    by_default: Any = ProxyHeadersMiddleware(app, "127.0.0.1,::1")  # type: ignore[arg-type]
    said = ["198.51.100.7", "203.0.113.9:8", "2001:db8::1", "[2001:db8:7::1]:9", "unknown", "a, 192.0.2.1 , 127.0.0.1"]
    async with served(by_default) as port, httpx.AsyncClient() as client:
        for named in said:
            await client.get(f"http://127.0.0.1:{port}/", headers={"x-forwarded-for": named})
    assert len({str(scope["client"][0]) for scope in seen}) == len(said)  # uvicorn believes it
    assert {source_of(scope, names_proxies=False) for scope in seen} == {HERE}
