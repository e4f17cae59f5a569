"""A replica that takes time and computes nothing: the real scheduler on stages of given costs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.types.cache import CacheGroup, CacheLayout
from spanwise.types.plan import LaneResult, Row, Sampled, StepPlan, StepResult


class StepCost(NamedTuple):
    """Seconds: of a step by itself, of a token of a prompt, of a row that decodes."""

    step_s: float
    prompt_token_s: float
    decode_row_s: float

    def of(self, rows: Sequence[Row]) -> float:
        """What a step of these rows takes."""
        decoding = sum(row.count == 1 and row.sample for row in rows)
        prompt_tokens = sum(row.count for row in rows) - decoding
        return self.step_s + self.prompt_token_s * prompt_tokens + self.decode_row_s * decoding

    def share(self, part: float) -> StepCost:
        """The cost of a part of the model."""
        return StepCost(*(part * each for each in self))


@dataclass(frozen=True)
class Wanted:
    """Requests alike, that come together."""

    num_requests: int
    num_prompt: int
    num_output: int


class Pipeline:
    """Stages, as the workers are: a step begins when the stage is through with the one before, the
    stage before it with this one, and, on the first, when every token it reads has been drawn.

    ``hop_s``: from a stage to the next, and with drawn tokens back to the first. ``way_s``: from
    the engine to the workers, and back.
    """

    def __init__(
        self, stages: Sequence[StepCost], hop_s: float = 2e-4, way_s: float = 5e-4
    ) -> None:
        self.scheduler = Scheduler(pipeline_config(len(stages)))
        self.now_s = 0.0
        self._stages, self._hop_s, self._way_s = stages, hop_s, way_s
        self._free_s = [0.0] * len(stages)
        self._drawn_s: dict[int, float] = {}
        self._in_flight: deque[tuple[float, StepPlan]] = deque()
        self._ids = count()

    def run(self, wanted: Wanted) -> float:
        """How long requests that come now take all together."""
        begun_s = self.now_s
        for sequence_id in (next(self._ids) for _ in range(wanted.num_requests)):
            prompt = tuple((sequence_id * 7 + i * 13) % 997 for i in range(wanted.num_prompt))
            request = SequenceRequest(
                sequence_id=sequence_id, prompt_token_ids=prompt, max_tokens=wanted.num_output
            )
            self.scheduler.add(request)
        self._feed()
        while self._in_flight:
            self.now_s, plan = self._in_flight.popleft()
            drawn = tuple(Sampled(r.sequence_id, 5 if r.sample else -1) for r in plan.lanes[0].rows)
            self.scheduler.accept(
                StepResult(plan.epoch, plan.step, (LaneResult(drawn),)), self.now_s
            )
            self._feed()
        assert not self.scheduler.num_running + self.scheduler.num_waiting
        return self.now_s - begun_s

    def _feed(self) -> None:
        while (plan := self.scheduler.next_plan(self.now_s)) is not None:
            done_s = self._compute(plan.lanes[0].rows)
            self._in_flight.append((done_s + self._way_s, plan))

    def _compute(self, rows: Sequence[Row]) -> float:
        """When the last stage is through."""
        drawn_s = [self._drawn_s.get(row.sequence_id, 0.0) for row in rows if row.count == 1]
        done_s = max([self.now_s + self._way_s, *(each + self._hop_s for each in drawn_s)])
        for stage, cost in enumerate(self._stages):
            begun_s = max(done_s + (self._hop_s if stage else 0.0), self._free_s[stage])
            done_s = self._free_s[stage] = begun_s + cost.of(rows)
        self._drawn_s |= {row.sequence_id: done_s for row in rows if row.sample}
        return done_s


def pipeline_config(num_stages: int) -> SchedulerConfig:
    """The engine's defaults, and blocks enough."""
    return SchedulerConfig(
        max_step_tokens=512,
        max_num_seqs=64,
        max_model_len=8192,
        vocab_size=1000,
        cache=CacheLayout(16, (CacheGroup((0,), 0, 100_000),)),
        num_micro_batches=num_stages,
        max_in_flight=2 if num_stages == 1 else 2 * num_stages,
    )


def speedup(model: StepCost, shares: Sequence[float], wanted: Wanted, warm: bool = True) -> float:
    """How many times faster stages that hold these parts of a model are than one that has all.

    ``warm``: they have served something before.
    """
    alone, split = Pipeline([model]), Pipeline([model.share(share) for share in shares])
    if warm:
        split.run(Wanted(16, 128, 16))
        split.run(Wanted(4, 512, 16))
    return alone.run(wanted) / split.run(wanted)
