"""The engine's counts in the text format of Prometheus.

Each stands there twice: as ``spanwise:...``, and under the name that dashboards and autoscalers of
this field know from vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from spanwise.types.serving import EngineStats, Histogram, ReplicaStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PREFIXES = ("spanwise", "vllm")
_LABELS = ("model_name", "engine")
# A name, what it tells, and where it is found.
_Reading = tuple[str, str, Callable[[ReplicaStats], float]]


def metrics_text(stats: EngineStats, model_name: str) -> bytes:
    """All of it; ``engine`` is the number of a replica, 0 where a count is of them all."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(stats, model_name))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, stats: EngineStats, model_name: str) -> None:
        self._stats, self._model = stats, model_name

    def collect(self) -> Iterator[Metric]:
        """Every metric under every prefix."""
        for prefix in _PREFIXES:
            yield from self._gauges(prefix)
            yield from self._counters(prefix)
            yield from self._histograms(prefix)

    def _gauges(self, prefix: str) -> Iterator[Metric]:
        for name, text, value in _REPLICA_GAUGES:
            gauge = GaugeMetricFamily(f"{prefix}:{name}", text, labels=_LABELS)
            for place, replica in enumerate(self._stats.replicas):
                gauge.add_metric((self._model, str(place)), value(replica))
            yield gauge

    def _counters(self, prefix: str) -> Iterator[Metric]:
        for name, text, count in _REPLICA_COUNTERS:
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=_LABELS)
            for place, replica in enumerate(self._stats.replicas):
                counter.add_metric((self._model, str(place)), count(replica))
            yield counter
        for name, text, total in (
            ("prompt_tokens", "Prompt tokens computed.", self._stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", self._stats.generation_tokens),
            ("request_refused", "Requests for which there was no room.", self._stats.num_refused),
        ):
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=_LABELS)
            counter.add_metric((self._model, "0"), total)
            yield counter
        ended = CounterMetricFamily(
            f"{prefix}:request_success",
            "Requests that ended, by reason.",
            labels=(*_LABELS, "finished_reason"),
        )
        for reason, total in sorted(self._stats.finished.items()):
            ended.add_metric((self._model, "0", reason), total)
        yield ended

    def _histograms(self, prefix: str) -> Iterator[Metric]:
        for name, text, histogram in (
            (
                "time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                self._stats.time_to_first_token_s,
            ),
            (
                "inter_token_latency_seconds",
                "Between one token of a sequence and the next.",
                self._stats.inter_token_latency_s,
            ),
            (
                "e2e_request_latency_seconds",
                "From a request's arrival to its end.",
                self._stats.e2e_latency_s,
            ),
            (
                "request_queue_time_seconds",
                "From a request's arrival to its first step.",
                self._stats.queue_time_s,
            ),
        ):
            family = HistogramMetricFamily(f"{prefix}:{name}", text, labels=_LABELS)
            family.add_metric((self._model, "0"), _buckets(histogram), histogram.total)
            yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds: Iterable[str] = (*map(str, histogram.bounds), "+Inf")
    return [*zip(bounds, map(float, accumulate(histogram.counts)), strict=True)]


def _usage(replica: ReplicaStats) -> float:
    return replica.num_used_blocks / replica.num_blocks if replica.num_blocks else 0.0


_REPLICA_GAUGES: tuple[_Reading, ...] = (
    ("num_requests_running", "Sequences being computed.", lambda r: r.num_running),
    ("num_requests_waiting", "Sequences waiting for a step.", lambda r: r.num_waiting),
    ("kv_cache_usage_perc", "Blocks of the KV cache in use; 1 is all.", _usage),
)
_REPLICA_COUNTERS: tuple[_Reading, ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up.", lambda r: r.prefix_queried_tokens),
    ("prefix_cache_hits", "Prompt tokens found computed.", lambda r: r.prefix_hit_tokens),
    ("num_preemptions", "Sequences put back into the queue.", lambda r: r.num_preempted),
    ("num_steps", "Steps computed.", lambda r: r.num_steps),
)
