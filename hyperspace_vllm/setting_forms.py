"""The forms that texts of settings must have: each function says what is expected instead of a text, None if it has it.

What a text is at all, and the bounds of numbers, are the types of `Config`.
"""

import os
import re
from urllib.parse import parse_qsl, urlsplit

from .core.records.endpoint import Endpoint, PeerAddress
from .core.records.errors import ProtocolViolation
from .core.records.ids import public_key_of

_PATH_MAX = 107 - len("/node.sock")  # sockaddr_un.sun_path holds 108 bytes, the last one zero
PATH_EXPECTED = f"a path of at most {_PATH_MAX} bytes of UTF-8 (a Unix socket lies in it)"
_TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
_REDIS_OPTIONS = {"redis": {"db"}, "rediss": {"db", *_TLS_OPTIONS}, "unix": {"db"}}  # by scheme, what may follow "?"


def host_port(text: str) -> str | None:
    """An endpoint."""
    try:
        Endpoint.of_setting(text)
    except ValueError:
        return "host:port"
    return None


def host_port_or_empty(text: str) -> str | None:
    """An endpoint, or nothing."""
    return host_port(text) if text else None


def host_port_or_port(text: str) -> str | None:
    """An endpoint, a port of this host, or nothing."""
    return host_port_or_empty(f"127.0.0.1:{text}" if text.isdigit() else text)


def peer_id(text: str) -> str | None:
    """The id of a node."""
    try:
        public_key_of(text)
    except ProtocolViolation as error:
        return str(error)
    return None


def peer(text: str) -> str | None:
    """A node and its endpoint."""
    try:
        PeerAddress.of_setting(text)
    except ValueError as error:
        return str(error)
    return None


def acronym(text: str) -> str | None:
    """Capitals, and the words that they stand for."""
    return None if all(text.split("=", 1)[1:]) else f"ACRONYM=its words, not {text!r}"


def redis_url(text: str) -> str | None:
    """The address of a Redis, or nothing."""
    return None if not text or _is_redis_url(text) else "one redis://host:port/0, rediss://… or unix:///path?db=0"


def _is_redis_url(text: str) -> bool:
    """Whether redis-py takes all of it, as it reads: it ignores a path that is no number."""
    try:
        url = urlsplit(text)
        options = dict(parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query)))
        port = url.port
    except ValueError:  # the port is no number, an option has no value
        return False
    known = url.scheme in _REDIS_OPTIONS and options.keys() <= _REDIS_OPTIONS[url.scheme]
    if not known or url.fragment or not re.fullmatch(r"[0-9]+", options.get("db", "0")):
        return False
    if url.scheme == "unix":
        return bool(url.path) and not url.hostname
    is_host = re.fullmatch(r"[^\s,]+", url.hostname or "") is not None
    return is_host and port != 0 and re.fullmatch(r"/?|/[0-9]+", url.path) is not None


def short_path(text: str) -> str | None:
    """A directory in which a Unix socket can lie."""
    return None if len(os.fsencode(text)) <= _PATH_MAX else PATH_EXPECTED
