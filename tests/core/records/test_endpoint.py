"""Where nodes are reached, as text: what names an endpoint, and what does not."""

import pytest

from hyperspace_vllm.core.records.endpoint import NAME_CHARS_MAX, Endpoint, PeerAddress
from hyperspace_vllm.core.records.ids import peer_id

PEER = peer_id(bytes(32))


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("10.0.0.1:7790", Endpoint("10.0.0.1", 7790)),
        ("node-7.example:1", Endpoint("node-7.example", 1)),
        ("[2001:db8::1]:65535", Endpoint("2001:db8::1", 65535)),
        ("[::]:0", Endpoint("::", 0)),
        ("[fe80::1%eth0]:1", Endpoint("fe80::1%eth0", 1)),
    ],
)
def test_an_endpoint_is_printed_as_it_was_written(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(text) == Endpoint.of_setting(text) == endpoint
    assert str(endpoint) == text
    assert str(PeerAddress(PEER, endpoint)) == f"{PEER}@{text}"


def test_an_ipv6_address_has_one_spelling() -> None:
    assert str(Endpoint.parse("[2001:DB8:0::1]:007")) == "[2001:db8::1]:7"
    assert str(Endpoint.parse("[::ffff:10.0.0.1]:7")) == str(Endpoint.parse("[::ffff:a00:1]:7"))


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", ":1", "host", "host:", "host:-1", "host:+1", "host: 1", "host:65536", "host:000001", "host:1/tcp"),
        *("host:\u0661", "host:\u00b2"),
    ],
)
def test_what_has_no_host_or_no_port_is_no_endpoint(text: str) -> None:
    for parse in (Endpoint.parse, Endpoint.of_setting):
        with pytest.raises(ValueError, match="expected host:port"):
            parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *("::1:7", "2001:db8::1:7", "[::1:7", "::1]:7", "[10.0.0.1]:7", "[host]:7", "[]:7"),
        *("tcp://host:7", "/ip4/h:7", "a b:7", "a\n:7", "h" * (NAME_CHARS_MAX + 1) + ":7"),
    ],
)
def test_between_nodes_the_host_is_a_name_or_an_address(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # ipaddress says what is wrong with an address
        Endpoint.parse(text)


def test_in_a_setting_an_ipv6_address_may_lack_its_brackets() -> None:
    assert str(Endpoint.of_setting("2001:db8::1:7")) == "[2001:db8::1]:7"
    address = PeerAddress.of_setting(f"{PEER}@::1:7")
    assert (address, str(address)) == (PeerAddress(PEER, Endpoint("::1", 7)), f"{PEER}@[::1]:7")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "<peer id>@host:port, not ''"),
        (PEER, "<peer id>@host:port, not"),
        (f"{PEER}@", "<peer id>@host:port, not"),
        (f"{PEER}@host", "<peer id>@host:port, not"),
        ("@host:1", "<peer id>@host:port: "),
        (f"{PEER}x@host:1", "<peer id>@host:port: "),
        ("host:1", "<peer id>@host:port, not 'host:1'"),
    ],
)
def test_what_names_no_peer_is_refused_with_what_is_expected(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        PeerAddress.of_setting(text)
