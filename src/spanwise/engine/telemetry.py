"""What the engine counts: tokens, times, how requests ended."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spanwise.scheduler.policy import Policy
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.stats import EndReason
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import StepPlan
from spanwise.types.serving import EngineStats, Histogram, ReplicaStats

_SHORT_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
            0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)  # fmt: skip
_LONG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
           20.0, 40.0, 80.0, 160.0, 320.0, 640.0)  # fmt: skip
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0,
           10_000.0, 20_000.0, 50_000.0, 100_000.0, 200_000.0)  # fmt: skip
_STEP_TOKENS = (1.0, *(2.0**power for power in range(3, 15)))
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)

# Every distribution that is kept of a replica, by its metric's name, and its buckets.
_BOUNDS: Mapping[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": _LONG_S,
    "inter_token_latency_seconds": _SHORT_S,
    "request_time_per_output_token_seconds": _SHORT_S,
    "e2e_request_latency_seconds": _LONG_S,
    "request_queue_time_seconds": _LONG_S,
    "request_inference_time_seconds": _LONG_S,
    "request_prefill_time_seconds": _LONG_S,
    "request_decode_time_seconds": _LONG_S,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
    "request_prefill_kv_computed_tokens": _TOKENS,
    "request_params_max_tokens": _TOKENS,
    "request_params_n": _CHOICES,
    "iteration_tokens_total": _STEP_TOKENS,
}
# Those that nobody has ended by yet are told too: an alarm needs to see the first one.
_REASONS = ("stop", "length", "deadline", "abort")


class _Observed:
    """A histogram that grows."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def record(self) -> Histogram:
        """The histogram as it stands."""
        return Histogram(self._bounds, tuple(self._counts), self._total)


class _Counts:
    """What one replica has done."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.finished: Counter[str] = Counter(dict.fromkeys(_REASONS, 0))
        self.observed = {name: _Observed(bounds) for name, bounds in _BOUNDS.items()}


@dataclass(slots=True)
class _Sequence:
    """A sequence on its way.

    ``begun_s``: its first step was planned. ``first_s``, ``last_s``: its first and its latest token
    came, or its vector. All are None before.
    """

    replica: int
    num_prompt: int
    arrived_s: float
    begun_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    num_cached: int = 0
    num_generated: int = 0


class Telemetry:
    """Counts since the start. Times are those of one monotonic clock, in seconds.

    What is counted of a sequence counts for the replica that computes it.
    """

    def __init__(self) -> None:
        self._num_refused = 0
        self._counts: defaultdict[int, _Counts] = defaultdict(_Counts)
        self._sequences: dict[int, _Sequence] = {}

    def refused(self, num_requests: int = 1) -> None:
        """Requests were refused for want of room."""
        self._num_refused += num_requests

    def asked(self, replica: int, num_choices: int, max_tokens: int | None) -> None:
        """A request was taken, its first choice by this replica."""
        observed = self._counts[replica].observed
        observed["request_params_n"].add(num_choices)
        if max_tokens is not None:
            observed["request_params_max_tokens"].add(max_tokens)

    def queued(self, sequence_id: int, replica: int, num_prompt: int, arrived_s: float) -> None:
        """A sequence was queued, of a request that arrived at this time."""
        self._sequences[sequence_id] = _Sequence(replica, num_prompt, arrived_s)

    def planned(self, replica: int, plan: StepPlan, now_s: float) -> None:
        """A step is about to be computed."""
        counts = self._counts[replica]
        num_tokens = sum(row.count for lane in plan.lanes for row in lane.rows)
        counts.observed["iteration_tokens_total"].add(num_tokens)
        for new in (new for lane in plan.lanes for new in lane.new):
            sequence = self._sequences[new.sequence_id]
            if sequence.begun_s is None:  # not one that comes back
                sequence.replica, sequence.begun_s = replica, now_s

    def brought(self, update: SequenceUpdate, now_s: float) -> None:
        """News of a sequence came."""
        sequence = self._sequences[update.sequence_id]
        counts = self._counts[sequence.replica]
        if update.token_ids or update.pooled is not None:
            if sequence.first_s is None:
                self._prompt_is_done(sequence, update, now_s)
            elif sequence.last_s is not None:
                counts.observed["inter_token_latency_seconds"].add(now_s - sequence.last_s)
            sequence.last_s = now_s
            sequence.num_generated += len(update.token_ids)
            counts.generation_tokens += len(update.token_ids)
        if update.finish_reason is not None:
            self.ended(update.sequence_id, update.finish_reason, now_s)

    def ended(self, sequence_id: int, reason: EndReason, now_s: float) -> None:
        """A sequence has ended. Times are kept of those that have come to their end."""
        sequence = self._sequences.pop(sequence_id)
        counts = self._counts[sequence.replica]
        counts.finished[reason] += 1
        if reason != "abort" and sequence.first_s is not None:
            for name, value in _lengths(sequence, now_s):
                counts.observed[name].add(value)

    def stats(self, schedulers: Sequence[Policy[SequenceRequest]]) -> EngineStats:
        """Everything as it stands, one scheduler to a replica; devices are for others to add."""
        replicas = tuple(self._replica(*each) for each in enumerate(schedulers))
        return EngineStats(replicas=replicas, num_refused=self._num_refused)

    def _prompt_is_done(self, sequence: _Sequence, update: SequenceUpdate, now_s: float) -> None:
        counts = self._counts[sequence.replica]
        sequence.first_s, sequence.num_cached = now_s, update.num_cached_tokens
        counts.prompt_tokens += sequence.num_prompt
        counts.cached_tokens += sequence.num_cached
        if update.token_ids:
            counts.observed["time_to_first_token_seconds"].add(now_s - sequence.arrived_s)

    def _replica(self, number: int, scheduler: Policy[SequenceRequest]) -> ReplicaStats:
        stats, counts = scheduler.stats, self._counts[number]
        groups = zip(stats.used_blocks, stats.total_blocks, strict=True)
        used, total = max(groups, key=lambda group: group[0] / group[1], default=(0, 0))
        return ReplicaStats(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_used_blocks=used,
            num_blocks=total,
            num_steps=stats.num_steps,
            num_preempted=stats.num_preemptions,
            prefix_queried_tokens=stats.prefix_queried_tokens,
            prefix_hit_tokens=stats.prefix_hit_tokens,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            generation_tokens=counts.generation_tokens,
            finished=dict(counts.finished),
            histograms={name: each.record() for name, each in counts.observed.items()},
        )


def _lengths(sequence: _Sequence, now_s: float) -> list[tuple[str, float]]:
    """What is observed of a sequence at its end."""
    assert sequence.begun_s is not None and sequence.first_s is not None
    assert sequence.last_s is not None
    decode_s = sequence.last_s - sequence.first_s
    lengths: list[tuple[str, float]] = [
        ("e2e_request_latency_seconds", now_s - sequence.arrived_s),
        ("request_queue_time_seconds", sequence.begun_s - sequence.arrived_s),
        ("request_inference_time_seconds", sequence.last_s - sequence.begun_s),
        ("request_prefill_time_seconds", sequence.first_s - sequence.begun_s),
        ("request_decode_time_seconds", decode_s),
        ("request_prompt_tokens", sequence.num_prompt),
        ("request_generation_tokens", sequence.num_generated),
        ("request_prefill_kv_computed_tokens", sequence.num_prompt - sequence.num_cached),
    ]
    if sequence.num_generated > 1:
        per_token_s = decode_s / (sequence.num_generated - 1)
        lengths.append(("request_time_per_output_token_seconds", per_token_s))
    return lengths
