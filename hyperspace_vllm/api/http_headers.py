"""The HTTP side of caching: Cache-Control of requests (RFC 9111 §5.2.1), Cache-Status (RFC 9211), Age."""

from collections.abc import Iterable
from dataclasses import dataclass

RawHeaders = list[tuple[bytes, bytes]]

PROOF = b"x-hyperspace-proof"  # of a request: anything; of its answer: the proof
LOAD_REPORT = b"endpoint-load-metrics-format"  # of a request: vLLM's answer has an ORCA load report in its headers
_SECONDS_MAX = 2**31


@dataclass(frozen=True, slots=True)
class Directives:
    """A request's directives. `private` is Hyperspace's own: answer from this node and store in it alone."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    private: bool = False
    max_age_s: int = _SECONDS_MAX
    min_fresh_s: int = 0

    def allows(self, age_s: int, ttl_s: int) -> bool:
        """Whether an entry of this age, fresh for this much longer, may answer."""
        return age_s <= self.max_age_s and ttl_s >= self.min_fresh_s


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """All values of a header, joined as RFC 9110 §5.3 says; names in ASGI are in lower case."""
    values = [value.decode("latin-1") for key, value in headers if key.lower() == name]
    return ", ".join(values) if values else None


def first_header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The first value of a header, which is all that vLLM reads."""
    return next((value.decode("latin-1") for key, value in headers if key.lower() == name), None)


def parse_cache_control(value: str | None) -> Directives:
    """The supported directives of a Cache-Control header; others are ignored, as the RFC requires."""
    wishes: dict[str, str] = {}
    for item in (value or "").split(","):
        name, _, argument = item.partition("=")
        wishes[name.strip().lower()] = argument.strip().strip('"')
    return Directives(
        no_cache="no-cache" in wishes,
        no_store="no-store" in wishes,
        only_if_cached="only-if-cached" in wishes,
        private="private" in wishes,
        # An unreadable age is 0: computing is better than serving an unwanted answer.
        max_age_s=_seconds(wishes["max-age"], 0) if "max-age" in wishes else _SECONDS_MAX,
        min_fresh_s=_seconds(wishes["min-fresh"], _SECONDS_MAX) if "min-fresh" in wishes else 0,
    )


def hit_headers(age_s: int, ttl_s: int, proof: bytes, detail: str) -> RawHeaders:
    """Headers of an answer from the cache; `proof` is the base64 of its CacheProof, empty while there is none.

    Only clients that ask for the proof get it: `without_proof` removes it for the others.
    """
    headers = [
        (b"cache-status", f"hyperspace; hit; ttl={ttl_s}; detail={detail}".encode()),
        (b"age", str(age_s).encode()),
        (b"cache-control", b"private"),
    ]
    return [*headers, (PROOF, proof)] if proof else headers


def without_proof(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """The headers of an answer for a client that asked for no proof."""
    return [(name, value) for name, value in headers if name != PROOF]


def forward_status(reason: str, stored: bool = False, collapsed: bool = False, detail: str = "") -> bytes:
    """Cache-Status of a computed answer: why it was computed, and whether it was stored."""
    status = f"hyperspace; fwd={reason}"
    if stored:
        status += "; stored"
    if collapsed:
        status += "; collapsed"
    return (status + (f"; detail={detail}" if detail else "")).encode()


def quoted(text: str) -> str:
    """A string of a structured header (RFC 9651 §3.3.3); characters that it cannot have are left out."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{"".join(char for char in escaped if " " <= char <= "~")}"'


def _seconds(text: str, otherwise: int) -> int:
    return min(int(text), _SECONDS_MAX) if text.isascii() and text.isdigit() and len(text) < 20 else otherwise
