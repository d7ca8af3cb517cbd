"""L2 counters that travel from scheduler and workers to vLLM's own /metrics.

The payload is plain JSON-like data (`{name: {label values joined by '|': number}}`, samples as a list), so that it
survives vLLM's serialisation without our classes on the other side.
"""

from dataclasses import dataclass, field
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

from ..contained import contained

LOOKUP_SECONDS = "hyperspace_l2_lookup_seconds"
LOOKUP_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SAMPLES_MAX = 1000  # lookup times kept between two reports; more would only repeat the distribution

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hyperspace_l2_lookups_total": ("Prefix lookups that ended, by result and reason.", ("result", "reason")),
    "hyperspace_l2_tokens_total": ("Prompt tokens asked for and taken from the cache.", ("kind",)),
    "hyperspace_l2_bytes_total": ("KV bytes copied into (loaded) and out of (saved) vLLM's blocks.", ("direction",)),
    "hyperspace_l2_loads_total": ("Loads that workers finished, one a rank.", ("result",)),
    "hyperspace_l2_saves_total": ("Rows that workers staged, or skipped and why.", ("result", "reason")),
}


@dataclass
class HyperspaceStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is untyped for us
    """Counts since the last report."""

    data: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Add `by` to a counter of `COUNTERS`."""
        values = self.data.setdefault(name, {})
        key = "|".join(labels)
        values[key] = values.get(key, 0) + by

    def observe_lookup(self, seconds: float) -> None:
        """One lookup took this long, from the request's first question to its answer."""
        samples = self.data.setdefault(LOOKUP_SECONDS, [])
        if len(samples) < SAMPLES_MAX:
            samples.append(seconds)

    def take(self) -> Self | None:
        """Everything so far as a separate object, resetting this one; None when there is nothing."""
        if not self.data:
            return None
        taken = type(self)(data=self.data)
        self.data = {}
        return taken

    def reset(self) -> None:
        """Reset all counts."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    @contained(lambda self, other: self)
    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """This object with `other`'s counts added."""
        for name, values in other.data.items():
            if name == LOOKUP_SECONDS:
                for seconds in values:
                    self.observe_lookup(seconds)
            else:
                for key, value in values.items():
                    self.count(name, key, by=value)
        return self

    @contained(lambda self: {})
    def reduce(self) -> dict[str, int | float]:
        """One line for vLLM's periodic log."""
        line: dict[str, int | float] = {}
        for name, values in self.data.items():
            if name == LOOKUP_SECONDS:
                line["L2 lookup max ms"] = round(max(values) * 1000, 1)
            else:
                short = name.removeprefix("hyperspace_l2_").removesuffix("_total")
                line.update({f"L2 {short} {key.replace('|', ' ')}": value for key, value in values.items()})
        return line


class HyperspacePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM is untyped for us
    """The same counts as Prometheus metrics, with vLLM's engine labels before ours."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=name, documentation=doc, labelnames=[*labelnames, *labels])
            for name, (doc, labels) in COUNTERS.items()
        }
        self._seconds = self._histogram_cls(
            name=LOOKUP_SECONDS,
            documentation="Seconds from a request's first question to its prefix answer.",
            labelnames=labelnames,
            buckets=LOOKUP_BUCKETS_S,
        )

    @contained()
    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report to the metrics."""
        engine = self.per_engine_labelvalues[engine_idx]
        for name, values in transfer_stats_data.items():
            if name == LOOKUP_SECONDS:
                for seconds in values:
                    self._seconds.labels(*engine).observe(seconds)
            else:
                for key, value in values.items():
                    self._counters[name].labels(*engine, *key.split("|")).inc(value)
