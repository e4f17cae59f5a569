"""A small scheduler of forward tasks, steps by hand, and devices that only take time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spanwise.scheduler.forward import ForwardScheduler
from spanwise.scheduler.forward_config import ForwardConfig
from spanwise.scheduler.item import ItemRequest
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.forward import TensorData
from spanwise.types.plan import LaneResult, Sampled, StepPlan, StepResult


def make_scheduler(**changes: object) -> ForwardScheduler:
    limits = {"max_batch_size": 4}
    return ForwardScheduler(ForwardConfig(**(limits | changes)))  # type: ignore[arg-type]


def item(sequence_id: int, **changes: object) -> ItemRequest:
    """An item whose input is its own number."""
    data = TensorData("x", "uint8", (4,), sequence_id.to_bytes(4, "little"))
    wanted = {"sequence_id": sequence_id, "inputs": (data,)}
    return ItemRequest(**(wanted | changes))  # type: ignore[arg-type]


def add(scheduler: ForwardScheduler, *sequence_ids: int, **changes: object) -> None:
    for sequence_id in sequence_ids:
        scheduler.add(item(sequence_id, **changes))


def items(plan: StepPlan | None) -> list[int]:
    """The items of a step; none where there is no step."""
    return [] if plan is None else [row.sequence_id for row in plan.lanes[0].rows]


def planned(scheduler: ForwardScheduler, now_s: float = 0.0) -> list[int]:
    """Plan a step and give its items."""
    return items(scheduler.next_plan(now_s))


def outputs(inputs: tuple[TensorData, ...]) -> tuple[TensorData, ...]:
    """What the devices make of an item."""
    (given,) = inputs
    return (TensorData("y", "uint8", (4,), bytes(255 - byte for byte in given.data)),)


def result_of(plan: StepPlan) -> StepResult:
    """What ranks that trust nothing answer: every row was introduced in its own step."""
    (lane,) = plan.lanes
    inputs = {new.sequence_id: new.inputs for new in lane.new}
    assert len(inputs) == len(lane.new) and list(inputs) == items(plan) and not lane.dropped
    sampled = tuple(Sampled(i, outputs=outputs(given)) for i, given in inputs.items())
    return StepResult(plan.epoch, plan.step, (LaneResult(sampled),))


def answer(
    scheduler: ForwardScheduler, plan: StepPlan, now_s: float | None = None
) -> list[SequenceUpdate]:
    return scheduler.accept(result_of(plan), now_s)


def run_step(scheduler: ForwardScheduler, now_s: float = 0.0, taken_s: float = 0.0) -> list[int]:
    """Plan a step, answer it, and give its items."""
    plan = scheduler.next_plan(now_s)
    assert plan is not None
    answer(scheduler, plan, now_s + taken_s)
    return items(plan)


@dataclass(frozen=True)
class Ended:
    """How an item ended, and when its caller heard of it."""

    reason: str
    at_s: float


@dataclass
class Devices:
    """Stages of equal speed, fed as ``EngineCore`` feeds them; a step passes them in order.

    ``step_s(batch_size)`` is what a batch takes in all stages together. ``look`` is called with
    every plan, before it is submitted.
    """

    scheduler: ForwardScheduler
    step_s: Callable[[int], float]
    num_stages: int = 1
    look: Callable[[StepPlan, float], None] = lambda plan, now_s: None
    now_s: float = 0.0
    ended: dict[int, Ended] = field(default_factory=dict)
    steps: list[tuple[float, list[int]]] = field(default_factory=list)
    in_flight: deque[tuple[float, StepPlan]] = field(default_factory=deque)
    stale: list[StepPlan] = field(default_factory=list)
    num_wakes: int = 0

    def __post_init__(self) -> None:
        self._free_s = [0.0] * self.num_stages

    def run_until(self, end_s: float) -> None:
        """Let time pass: results come, and what time alone changes is done."""
        while (next_s := self._next_s()) is not None and next_s <= end_s:
            self.now_s = max(self.now_s, next_s)
            if self.in_flight and self.in_flight[0][0] <= self.now_s:
                self._take_in()
            else:
                self.num_wakes += 1
                assert self.num_wakes < 100_000, "time changes nothing"
                self.feed()
        self.now_s = max(self.now_s, end_s)

    def run_out(self) -> None:
        """Let time pass until nothing is left to do."""
        while (next_s := self._next_s()) is not None:
            self.run_until(max(self.now_s, next_s))

    def feed(self) -> None:
        wake_at_s = self.scheduler.wake_at_s
        if wake_at_s is not None and wake_at_s <= self.now_s:
            self._note(self.scheduler.expire(self.now_s))
        self._submit()

    def restart(self, epoch: int) -> None:
        """All that is in flight is lost, though late answers may still come."""
        self.scheduler.restart(epoch)
        self.stale += [plan for _, plan in self.in_flight]
        self.in_flight.clear()
        self._free_s = [self.now_s] * self.num_stages
        self.feed()

    def _next_s(self) -> float | None:
        result_s = [self.in_flight[0][0]] if self.in_flight else []
        wake_at_s = self.scheduler.wake_at_s
        return min(result_s + ([] if wake_at_s is None else [wake_at_s]), default=None)

    def _take_in(self) -> None:
        if self.stale:
            assert answer(self.scheduler, self.stale.pop(), self.now_s) == []
        _, plan = self.in_flight.popleft()
        given = {new.sequence_id: outputs(new.inputs) for new in plan.lanes[0].new}
        updates = answer(self.scheduler, plan, self.now_s)
        assert all(update.outputs == given[update.sequence_id] for update in updates)
        self._note(updates)
        self._submit()

    def _submit(self) -> None:
        while (plan := self.scheduler.next_plan(self.now_s)) is not None:
            self.look(plan, self.now_s)
            self.steps.append((self.now_s, items(plan)))
            done_s, part_s = self.now_s, self.step_s(len(items(plan))) / self.num_stages
            for stage, free_s in enumerate(self._free_s):
                done_s = self._free_s[stage] = max(done_s, free_s) + part_s
            self.in_flight.append((done_s, plan))

    def _note(self, updates: Sequence[SequenceUpdate]) -> None:
        for update in updates:
            assert update.sequence_id not in self.ended, "an item ended twice"
            assert update.finish_reason is not None
            self.ended[update.sequence_id] = Ended(update.finish_reason, self.now_s)
