"""The node's own /metrics, and what clients of it can take."""

import socket
import time
import urllib.request

import pytest

from hyperspace_vllm.core.records.limits import METRICS_CONNECTIONS_MAX, METRICS_DEADLINE_S
from hyperspace_vllm.daemon.metrics import Metrics

pytestmark = pytest.mark.io


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return str(response.read().decode())


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_metrics_are_served_where_asked(host: str) -> None:
    assert "hyperspace_lookups_total" in scrape(Metrics().listen(f"{host}:0"))


def test_silent_connections_are_bounded_in_number_and_time() -> None:
    address = Metrics().listen("0")
    host, _, port = address.rpartition(":")
    began_s = time.monotonic()
    silent = [socket.create_connection((host, int(port))) for _ in range(METRICS_CONNECTIONS_MAX)]
    silent[0].sendall(b"GET /metrics HTTP/1.0\r\n")  # and never the end of its head
    with socket.create_connection((host, int(port))) as one_more:
        one_more.settimeout(5)
        assert one_more.recv(1) == b""  # closed at once
    assert time.monotonic() - began_s < METRICS_DEADLINE_S
    for each in silent:
        each.settimeout(METRICS_DEADLINE_S + 5)
        assert each.recv(1) == b""
        each.close()
    assert "hyperspace_lookups_total" in scrape(address)
