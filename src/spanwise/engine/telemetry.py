"""What the engine counts: tokens, times, how requests ended."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from spanwise.scheduler.scheduler import Scheduler
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.serving import EngineStats, Histogram, ReplicaStats

_SHORT_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
            0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)  # fmt: skip
_LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
           80.0, 160.0, 320.0, 640.0)  # fmt: skip


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


class Telemetry:
    """Counts since the start. Times are those of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._num_refused = 0
        self._finished: Counter[str] = Counter()
        self._first_token = _Observed(_LONG_S)
        self._inter_token = _Observed(_SHORT_S)
        self._e2e = _Observed(_LONG_S)
        self._last_token_s: dict[int, float] = {}

    def queued(self, num_prompt_tokens: int) -> None:
        """A request was queued."""
        self._prompt_tokens += num_prompt_tokens

    def refused(self) -> None:
        """A request was refused for want of room."""
        self._num_refused += 1

    def brought(self, update: SequenceUpdate, arrived_s: float, now_s: float) -> None:
        """News of a sequence came, of a request that arrived at this time."""
        sequence_id = update.sequence_id
        if update.token_ids:
            self._generation_tokens += len(update.token_ids)
            last_s = self._last_token_s.get(sequence_id)
            if last_s is None:
                self._first_token.add(now_s - arrived_s)
            else:
                self._inter_token.add(now_s - last_s)
            self._last_token_s[sequence_id] = now_s
        if update.finish_reason is not None:
            self._e2e.add(now_s - arrived_s)
            self.ended(sequence_id, update.finish_reason)

    def ended(self, sequence_id: int, reason: str) -> None:
        """A sequence has ended."""
        self._last_token_s.pop(sequence_id, None)
        self._finished[reason] += 1

    def stats(self, schedulers: Sequence[Scheduler]) -> EngineStats:
        """Everything as it stands."""
        return EngineStats(
            replicas=tuple(_replica(scheduler) for scheduler in schedulers),
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            finished=dict(self._finished),
            num_refused=self._num_refused,
            time_to_first_token_s=self._first_token.record(),
            inter_token_latency_s=self._inter_token.record(),
            e2e_latency_s=self._e2e.record(),
        )


def _replica(scheduler: Scheduler) -> ReplicaStats:
    stats = scheduler.stats
    groups = zip(stats.used_blocks, stats.total_blocks, strict=True)
    used, total = max(groups, key=lambda group: group[0] / group[1])
    return ReplicaStats(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_used_blocks=used,
        num_blocks=total,
        num_steps=stats.num_steps,
        num_preempted=stats.num_preemptions,
        prefix_queried_tokens=stats.prefix_queried_tokens,
        prefix_hit_tokens=stats.prefix_hit_tokens,
    )
