"""The middleware's counters, in prometheus_client's default registry, so that vLLM's own /metrics shows them."""

from functools import cache

from prometheus_client import Counter, Histogram


class L1Metrics:
    """hyperspace_l1_*: lookups by result and reason, time of a hit inside the middleware, stored answers, and the
    results of lookups in other nodes and of comparing questions.
    """

    def __init__(self) -> None:
        self.lookups = Counter(
            "hyperspace_l1_lookups_total",
            "Requests seen by the response cache, by result (hit, collapsed, miss, bypass) and reason.",
            ("result", "reason"),
        )
        self.hit_seconds = Histogram(
            "hyperspace_l1_hit_seconds",
            "Seconds from the arrival of a request's body to the last byte of an answer from this node's cache.",
            buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
        )
        self.similar = Counter(
            "hyperspace_l1_similar_lookups_total",
            "Questions compared with stored ones, by the outcome: found, far, busy, late, or the guard that refused.",
            ("outcome",),
        )
        self.network = Counter(
            "hyperspace_l1_network_lookups_total",
            "Lookups in other nodes, by what they came to (see docs/operations.md).",
            ("outcome",),
        )
        self.network_hit_seconds = Histogram(
            "hyperspace_l1_network_hit_seconds",
            "Seconds from the arrival of a request's body to the last byte of an answer from another node.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5),
        )
        self.stored = Counter(
            "hyperspace_l1_stored_total",
            "Computed answers, by what became of them (sent to the node, or why not).",
            ("result",),
        )


@cache
def l1_metrics() -> L1Metrics:
    """The one set of this process: the registry takes each name once. Made on first use, not on import."""
    return L1Metrics()
