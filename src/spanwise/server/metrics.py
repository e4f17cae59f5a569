"""The engine's counts in the text format of Prometheus.

Each stands there twice: as ``spanwise:...``, and under the name that dashboards and autoscalers of
this field know from vLLM. What is known of devices has no such name, and stands there once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from spanwise.types.serving import DeviceStats, EngineStats, Histogram, ReplicaStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PREFIXES = ("spanwise", "vllm")
_LABELS = ("model_name", "engine")
_DEVICE_LABELS = ("model_name", "device", "replica", "stage", "rank")
# A name, what it tells, and where it is found.
_Reading = tuple[str, str, Callable[[ReplicaStats], float]]
_DeviceReading = tuple[str, str, Callable[[DeviceStats], float]]


def metrics_text(stats: EngineStats, model_name: str) -> bytes:
    """All of it; ``engine`` is the number of a replica."""
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
            yield from self._cache(prefix)
            yield from self._counters(prefix)
            yield from self._histograms(prefix)
        yield from self._devices()

    def _gauges(self, prefix: str) -> Iterator[Metric]:
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"{prefix}:{name}", text, labels=_LABELS)
            for labels, replica in self._replicas():
                gauge.add_metric(labels, value(replica))
            yield gauge

    def _cache(self, prefix: str) -> Iterator[Metric]:
        """A gauge that is always 1: the facts are its labels, named as routers expect them."""
        cache = self._stats.cache
        if cache is None:
            return
        facts = {
            "block_size": cache.block_size,
            "num_gpu_blocks": cache.num_tokens // cache.block_size,
            "kv_cache_size_tokens": cache.num_tokens,
            "enable_prefix_caching": cache.prefix_caching,
        }
        text = "The KV cache of a replica, on whatever device it lies."
        info = GaugeMetricFamily(
            f"{prefix}:cache_config_info", text, labels=(*_LABELS, *facts.keys())
        )
        for labels, _ in self._replicas():
            info.add_metric((*labels, *map(str, facts.values())), 1)
        yield info

    def _counters(self, prefix: str) -> Iterator[Metric]:
        for name, text, count in _COUNTERS:
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=_LABELS)
            for labels, replica in self._replicas():
                counter.add_metric(labels, count(replica))
            yield counter
        text = "Requests for which there was no room, whatever replica would have taken them."
        refused = CounterMetricFamily(f"{prefix}:request_refused", text, labels=("model_name",))
        refused.add_metric((self._model,), self._stats.num_refused)
        yield refused
        ended = CounterMetricFamily(
            f"{prefix}:request_success",
            "Sequences that ended, by reason.",
            labels=(*_LABELS, "finished_reason"),
        )
        for labels, replica in self._replicas():
            for reason, total in sorted(replica.finished.items()):
                ended.add_metric((*labels, reason), total)
        yield ended

    def _histograms(self, prefix: str) -> Iterator[Metric]:
        for name, text in _HISTOGRAMS.items():
            family = HistogramMetricFamily(f"{prefix}:{name}", text, labels=_LABELS)
            for labels, replica in self._replicas():
                if (histogram := replica.histograms.get(name)) is not None:
                    family.add_metric(labels, _buckets(histogram), histogram.total)
            yield family

    def _devices(self) -> Iterator[Metric]:
        for kind, readings in (
            (GaugeMetricFamily, _DEVICE_GAUGES),
            (CounterMetricFamily, _DEVICE_COUNTERS),
        ):
            for name, text, value in readings:
                family = kind(f"spanwise:{name}", text, labels=_DEVICE_LABELS)
                for device in self._stats.devices:
                    place = map(str, (device.replica, device.stage, device.rank))
                    family.add_metric((self._model, device.device, *place), value(device))
                yield family

    def _replicas(self) -> Iterator[tuple[tuple[str, str], ReplicaStats]]:
        """Each replica, with its labels."""
        for place, replica in enumerate(self._stats.replicas):
            yield (self._model, str(place)), replica


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds: Iterable[str] = (*map(str, histogram.bounds), "+Inf")
    return [*zip(bounds, map(float, accumulate(histogram.counts)), strict=True)]


def _usage(replica: ReplicaStats) -> float:
    return replica.num_used_blocks / replica.num_blocks if replica.num_blocks else 0.0


_GAUGES: tuple[_Reading, ...] = (
    ("num_requests_running", "Sequences being computed.", lambda r: r.num_running),
    ("num_requests_waiting", "Sequences waiting for a step.", lambda r: r.num_waiting),
    ("kv_cache_usage_perc", "Blocks of the KV cache in use; 1 is all.", _usage),
)
_COUNTERS: tuple[_Reading, ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up.", lambda r: r.prefix_queried_tokens),
    ("prefix_cache_hits", "Prompt tokens found computed.", lambda r: r.prefix_hit_tokens),
    ("num_preemptions", "Sequences put back into the queue.", lambda r: r.num_preempted),
    ("num_steps", "Steps computed.", lambda r: r.num_steps),
    ("prompt_tokens", "Tokens of prompts that are computed or found.", lambda r: r.prompt_tokens),
    ("prompt_tokens_cached", "Those of them that were found.", lambda r: r.cached_tokens),
    ("generation_tokens", "Tokens generated.", lambda r: r.generation_tokens),
)
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between one token of a sequence and the next.",
    "request_time_per_output_token_seconds": "Mean time between the tokens of a sequence.",
    "e2e_request_latency_seconds": "From a request's arrival to a sequence's end.",
    "request_queue_time_seconds": "From a request's arrival to a sequence's first step.",
    "request_inference_time_seconds": "From a sequence's first step to its last token.",
    "request_prefill_time_seconds": "From a sequence's first step to its first token.",
    "request_decode_time_seconds": "From a sequence's first token to its last.",
    "request_prompt_tokens": "Prompt tokens of a sequence.",
    "request_generation_tokens": "Tokens generated by a sequence.",
    "request_prefill_kv_computed_tokens": "Prompt tokens of a sequence that were not found.",
    "request_params_max_tokens": "What requests give as max_tokens, where they do.",
    "request_params_n": "What requests give as n.",
    "iteration_tokens_total": "Tokens computed by a step, prompt and generated.",
}
_DEVICE_GAUGES: tuple[_DeviceReading, ...] = (
    (
        "device_utilization",
        "Share of about the last second that the rank spent in steps; 1 is all.",
        lambda d: d.utilization,
    ),
    (
        "device_memory_used_bytes",
        "What the rank's process has in use on its device; on a CPU all that is resident.",
        lambda d: d.memory_used_bytes,
    ),
    (
        "device_memory_total_bytes",
        "Memory of the device; of a CPU device, the host's.",
        lambda d: d.memory_total_bytes,
    ),
    ("device_weight_bytes", "Weights that the rank holds.", lambda d: d.weight_bytes),
    ("device_kv_cache_bytes", "What the rank's KV cache may take.", lambda d: d.cache_bytes),
)
_DEVICE_COUNTERS: tuple[_DeviceReading, ...] = (
    ("device_busy_seconds", "Time that the rank has spent in steps.", lambda d: d.busy_s),
)
