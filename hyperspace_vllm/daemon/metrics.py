"""The node's Prometheus metrics; docs/operations.md says what each means."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..core.records.endpoint import Endpoint
from .metrics_endpoint import serve_metrics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters, gauges and histograms of one node, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.lookups_total = Counter(
            "hyperspace_lookups_total",
            "Lookups by layer (l1, redis, l2), result (hit, miss) and reason.",
            ("layer", "result", "reason"),
            registry=self.registry,
        )
        self.lookup_seconds = Histogram(
            "hyperspace_lookup_seconds",
            "Time from a lookup to its answer.",
            ("layer",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.bytes_total = Counter(
            "hyperspace_bytes_total",
            "Payload bytes by direction: stored, fetched, served, shared, copied.",
            ("direction",),
            registry=self.registry,
        )
        self.failures_total = Counter(
            "hyperspace_failures_total",
            "Failures by layer and reason; each ended as a miss.",
            ("layer", "reason"),
            registry=self.registry,
        )
        self.audits_total = Counter(
            "hyperspace_audits_total",
            "Audits of other nodes' responses by result: passed, dropped, lie.",
            ("result",),
            registry=self.registry,
        )
        self.rows = Gauge("hyperspace_rows", "KV rows held by tier: memory, disk.", ("tier",), registry=self.registry)
        self.store_bytes = Gauge(
            "hyperspace_store_bytes",
            "Bytes held by tier: memory, disk, response.",
            ("tier",),
            registry=self.registry,
        )
        self.staged_dropped_total = Counter(
            "hyperspace_staged_dropped_total",
            "Rows that an engine staged and the node did not keep, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.peers = Gauge(
            "hyperspace_peers", "Peers that KV may be asked of, configured or discovered.", registry=self.registry
        )
        self.connected_peers = Gauge("hyperspace_connected_peers", "Nodes connected by libp2p.", registry=self.registry)
        self.search_cpu_seconds = Histogram(
            "hyperspace_search_cpu_seconds",
            "CPU time of libp2p's thread during a search of the DHT.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.semantic_wrong_ratio = Gauge(
            "hyperspace_semantic_wrong_ratio",
            "Share of semantic matches whose answer differed from the engine's: estimate, and low and high at 95 %.",
            ("bound",),
            registry=self.registry,
        )
        self.clients = Gauge("hyperspace_clients", "Processes that hold a lease.", registry=self.registry)
        self.quarantined_bytes = Gauge(
            "hyperspace_quarantined_bytes",
            "Arena bytes that a vanished process may still write to; never reused by this node.",
            registry=self.registry,
        )

    def listen(self, address: str) -> str:
        """Serve /metrics at `address` (host:port, or a port on loopback); the bound address."""
        wanted = Endpoint.of_setting(address if ":" in address else f"127.0.0.1:{address}")
        return str(Endpoint(wanted.host, serve_metrics(wanted.host, wanted.port, self.registry)))
