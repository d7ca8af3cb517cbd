"""The node's /metrics over HTTP, in threads of its own: bounded in connections, each in time."""

import socket
import threading
import time
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from ..core.records.limits import METRICS_CONNECTIONS_MAX, METRICS_DEADLINE_S


def serve_metrics(host: str, port: int, registry: CollectorRegistry) -> int:
    """Serve `registry` at /metrics until the process ends; the port, which the system chooses for 0.

    Raises OSError where it can't listen.
    """
    kind = _IPv6Server if ":" in host else _Server
    server = make_server(host, port, make_wsgi_app(registry), kind, _SilentHandler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_address[1])


class _Server(ThreadingMixIn, WSGIServer):
    """Connections beyond METRICS_CONNECTIONS_MAX are closed at once, slow ones at their deadline."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._deadlines_s: dict[Any, float] = {}  # by socket; shared with the threads that serve them
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._deadlines_s) >= METRICS_CONNECTIONS_MAX:
            self.shutdown_request(request)
            return
        self._deadlines_s[request] = time.monotonic() + METRICS_DEADLINE_S
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines_s.pop(request, None)

    def service_actions(self) -> None:
        """Called twice a second."""
        now_s = time.monotonic()
        for request in [r for r, deadline_s in list(self._deadlines_s.items()) if deadline_s < now_s]:
            with suppress(OSError):  # it has ended
                request.shutdown(socket.SHUT_RDWR)  # its thread, which waits for it, ends

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is not worth a traceback."""


class _IPv6Server(_Server):
    address_family = socket.AF_INET6


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A line for each request would fill the log."""
