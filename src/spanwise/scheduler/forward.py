"""The policy of forward tasks: which items share a step. Pure: no clock, no chance."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from math import inf

from spanwise.errors import InputError
from spanwise.scheduler.deadlines import Deadlines
from spanwise.scheduler.forward_config import ForwardConfig
from spanwise.scheduler.item import ItemRequest
from spanwise.scheduler.item_batch import ItemBatch, fill, leaves_room
from spanwise.scheduler.item_queue import ItemQueue, WaitingItem
from spanwise.scheduler.least_times import LeastTimes
from spanwise.scheduler.service import Service
from spanwise.scheduler.stats import EndReason, SchedulerStats, Tally
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.outputs import FinishReason
from spanwise.types.plan import LanePlan, NewSequence, Row, Sampled, StepPlan, StepResult
from spanwise.types.sampling import SamplingSpec

# Who has no deadline gives way to those who have for so many steps; then one step in so many is of
# the eldest.
_PATIENCE_STEPS, _STEPS_TO_ELDEST = 64, 8
_TRIAL = 8  # one in so many that seem too late is tried all the same

_AT_ONCE = -inf


@dataclass(frozen=True)
class _Step:
    """A step in flight."""

    number: int
    batch: ItemBatch
    planned_s: float


class ForwardScheduler:
    """One replica's scheduler of forward tasks: items in, step plans out, results in, outputs out.

    Plans are to be run in the order given, results to be handed back in that order. A step is one
    batch. Each of its items is introduced and has one row, whose ``count`` and ``length`` are its
    cost; ranks know it no more after the step, so no plan has ``dropped``.

    Of the waiting those with the smallest priority are first; among equals the earliest deadline
    (none is last), then the tenant with the least service so far, then by age. Whoever is first
    takes others of its shape along. Where the first one's batch could take more, it waits for
    others until ``max_delay_s`` have passed since the oldest of it came, unless a deadline is
    nearer; and then, as long as there is a step in flight for each stage, it grows while they
    compute. A batch that is full goes ahead, past a growing one of another shape at most once.
    Where deadlines never leave a turn to those who have none, one step in eight is of the eldest of
    these. So none is held up for good by those of its own priority or a larger one.

    A batch that could not be computed is computed anew item by item, before anything else; an item
    that cannot be computed by itself ends with the error.

    What is too late is dropped before it costs a step: its deadline has passed, or comes before the
    end of the fastest step that its shape has had.

    Priorities above 0 are background work. It waits while anything of a smaller priority waits, and
    is planned only while there is not a step for each stage, full or not: an urgent item that comes
    then has at most one step of it for each stage before it, and a place in the window.

    The times given are on any clock, the same for all, and never go back. An item has come when
    ``next_plan`` or ``expire`` is called after its ``add``.
    """

    def __init__(self, config: ForwardConfig, epoch: int = 0) -> None:
        self._config = config
        self._epoch = epoch
        self._step = 0
        self._num_arrived = 0
        self._service = Service()
        self._waiting = ItemQueue(self._service)
        self._unseen: list[WaitingItem] = []
        self._newest: dict[tuple[str, str], WaitingItem] = {}  # of each stream, while it waits
        self._deadlines = Deadlines()  # when an item must have been planned
        self._ended: dict[int, FinishReason] = {}  # and not told yet
        self._planned: dict[int, WaitingItem] = {}  # not answered yet, nor aborted
        self._in_flight: deque[_Step] = deque()
        self._lost: deque[ItemBatch] = deque()  # in flight at a restart: planned again first
        self._opens_at_s: float | None = None  # when a batch has waited long enough
        self._all_grow = False  # known: while all stages have work, none of the batches may go
        self._came_s = _AT_ONCE  # the last result
        self._times = LeastTimes()
        self._num_hopeless = 0
        self._eldest_step = 0
        self._tally = Tally()

    @property
    def epoch(self) -> int:
        """The epoch that plans carry now."""
        return self._epoch

    @property
    def num_waiting(self) -> int:
        """Items not planned yet, or to be planned anew after a restart."""
        return len(self._waiting) + len(self._lost_items())

    @property
    def num_waiting_tokens(self) -> int:
        """What those that wait cost, each by itself."""
        return self._waiting.total_cost + sum(i.request.cost for i in self._lost_items())

    @property
    def num_running(self) -> int:
        """Items of the steps in flight."""
        return len(self._planned) - len(self._lost_items())

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not yet answered."""
        return len(self._in_flight)

    @property
    def num_used_blocks(self) -> tuple[int, ...]:
        """There is no cache, so no group of it."""
        return ()

    @property
    def num_seats(self) -> int:
        """How many items may run at once."""
        return self._config.max_batch_size * self._config.max_in_flight

    @property
    def block_size(self) -> int:
        """Nothing is found computed: ``prefix_keys`` has no keys."""
        return 1

    @property
    def can_start(self) -> bool:
        """Whether one item more would be planned with the next step, full or not."""
        return self._is_open and not self._lost

    @property
    def num_places(self) -> int:
        """How many items more would be planned with the next step: a batch, or none."""
        return self._config.max_batch_size if self.can_start else 0

    @property
    def wake_at_s(self) -> float | None:
        """When time alone will change something: a batch need not grow, or is too late to begin.

        Minus infinity where items have ended that ``expire`` has not told of yet.
        """
        if self._ended:
            return _AT_ONCE
        times = (self._opens_at_s, self._deadlines.next_s)
        return min((time for time in times if time is not None), default=None)

    @property
    def stats(self) -> SchedulerStats:
        """What is at hand and what was done. Planned prefill tokens are what batches cost."""
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_waiting_tokens=self.num_waiting_tokens,
            used_blocks=(),
            total_blocks=(),
            **asdict(self._tally),
        )

    def check(self, request: ItemRequest) -> None:
        """Raise InputError for an item that could never run here."""
        most = self._config.max_batch_cost
        if request.cost < 1:
            raise InputError(f"an item's cost must be at least 1, got {request.cost}")
        if most is not None and request.cost > most:
            raise InputError(
                f"the item costs {request.cost}, more than max_batch_cost {most}; shorten it or "
                "raise the limit"
            )

    def group_of(self, request: ItemRequest) -> str:
        """Items of a stream belong together: a newer one must find the older."""
        return f"{request.tenant}\0{request.stream}" if request.stream else ""

    def prefix_keys(self, request: ItemRequest) -> list[bytes]:
        """None: no item shares what was computed for another."""
        return []

    def add(self, request: ItemRequest) -> None:
        """Queue an item; an older one of its stream that waits ends. Raises as ``check``."""
        assert not self._knows(request.sequence_id), "a sequence id was used twice"
        self.check(request)
        stream = (request.tenant, request.stream)
        older = self._newest.get(stream)
        if older is not None:
            self._end_waiting(older, "superseded")
        item = WaitingItem(request, self._num_arrived, self._tally.num_steps, older)
        self._num_arrived += 1
        self._waiting.add(item)
        self._all_grow = self._all_grow and self._grows(item)
        if item.seen_s is None:
            self._unseen.append(item)
        if request.stream:
            self._newest[stream] = item
        if request.deadline_s is not None:
            self._deadlines.add(request.sequence_id, self._latest_start_s(request))

    def abort(self, sequence_id: int) -> None:
        """Forget an item and what of it is in flight; no error if it has ended already."""
        if (item := self._waiting.get(sequence_id)) is not None:
            self._leave(item)
        elif not (self._planned.pop(sequence_id, None) or self._ended.pop(sequence_id, None)):
            return
        self._count("abort")

    def expire(self, now_s: float) -> list[SequenceUpdate]:
        """Drop what is too late; tell of all that ended without a step."""
        self._look(now_s)
        ended, self._ended = self._ended, {}
        for reason in ended.values():
            self._count(reason)
        return [SequenceUpdate(sequence_id=i, finish_reason=why) for i, why in ended.items()]

    def withdrawable(self) -> list[int]:
        """Those of which no step was planned, the least urgent and youngest first.

        Items of a stream stay: the next one must find them.
        """
        movable = [item for item in self._waiting if not item.request.stream]
        movable.sort(key=lambda item: item.place, reverse=True)
        return [item.request.sequence_id for item in movable]

    def withdraw(self, sequence_id: int) -> ItemRequest | None:
        """Take back an item to run it elsewhere; None if it was planned or has ended."""
        item = self._waiting.get(sequence_id)
        if item is None:
            return None
        self._leave(item)
        return item.request

    def next_plan(self, now_s: float = 0.0) -> StepPlan | None:
        """Plan the next step; None when the window is full or all that waits is to grow.

        Never None while nothing is in flight and an item waits, unless a batch waits for others:
        see ``wake_at_s``. What is too late is not planned; ``expire`` tells of it.
        """
        self._opens_at_s = None
        self._look(now_s)
        if len(self._in_flight) >= self._config.max_in_flight:
            return None
        batch = self._next_lost()
        if batch is None and (batch := self._choose(now_s)) is not None:
            self._begin(batch)
        return None if batch is None else self._emit(batch, now_s)

    def accept(self, result: StepResult, now_s: float | None = None) -> list[SequenceUpdate]:
        """Take in the oldest step in flight. What an older epoch gave is dropped.

        ``now_s``: when it came, from which is learnt what steps take.
        """
        assert result.epoch <= self._epoch, "a result came from an epoch yet to begin"
        if result.epoch < self._epoch:
            return []
        step = self._in_flight.popleft()
        assert step.number == result.step, f"step {result.step} came before step {step.number}"
        if now_s is not None:
            self._measure(step, now_s)
        (lane,) = result.lanes
        items = step.batch.items
        if len(items) > 1 and any(sampled.error for sampled in lane.sampled):
            # Which of them it is shows when each is computed by itself.
            self._lost.extendleft(ItemBatch((item,), is_full=True) for item in reversed(items))
            return []
        updates = []
        for item, sampled in zip(items, lane.sampled, strict=True):
            sequence_id = item.request.sequence_id
            assert sampled.sequence_id == sequence_id, "results came in another order"
            if self._planned.pop(sequence_id, None) is not None:
                updates.append(self._finished(sampled))
        return updates

    def _finished(self, sampled: Sampled) -> SequenceUpdate:
        assert sampled.outputs is not None or sampled.error, "an item came back without anything"
        reason: FinishReason = "error" if sampled.error else "stop"
        self._count(reason)
        return SequenceUpdate(
            sequence_id=sampled.sequence_id,
            outputs=sampled.outputs,
            error=sampled.error,
            finish_reason=reason,
        )

    def restart(self, epoch: int) -> None:
        """Begin a new epoch: ranks know nothing, all in flight is lost, steps count from 0.

        What was lost is planned again before anything else, in the same batches and order.
        """
        assert epoch > self._epoch, f"epoch {epoch} does not follow epoch {self._epoch}"
        self._epoch = epoch
        self._step = 0
        self._lost.extendleft(step.batch for step in reversed(self._in_flight))
        self._in_flight.clear()
        self._came_s = _AT_ONCE

    # Planning, in the order of `next_plan`.

    def _look(self, now_s: float) -> None:
        """Time has passed: items have come, or are too late."""
        for come in self._unseen:
            come.seen_s = now_s
        self._unseen.clear()
        for sequence_id in self._deadlines.passed(now_s):
            item = self._waiting.get(sequence_id)
            assert item is not None and item.request.deadline_s is not None
            deadline_s, latest_s = item.request.deadline_s, self._latest_start_s(item.request)
            if latest_s > now_s:  # less is known by now to take that long
                self._deadlines.add(sequence_id, latest_s)
            elif deadline_s > now_s and self._is_trial():
                self._deadlines.add(sequence_id, deadline_s)
            else:
                self._end_waiting(item, "deadline")

    def _is_trial(self) -> bool:
        """Whether to try what seems too late: else no step might show that they are faster now."""
        self._num_hopeless += 1
        return self._num_hopeless % _TRIAL == 0

    def _next_lost(self) -> ItemBatch | None:
        while self._lost:
            batch = self._lost.popleft()
            items = tuple(i for i in batch.items if i.request.sequence_id in self._planned)
            if items:
                return ItemBatch(items, batch.is_full)
        return None

    def _choose(self, now_s: float) -> ItemBatch | None:
        """The batch of whoever is first in order and may go now."""
        if self._all_grow and not self._is_open:
            return None
        passed: list[WaitingItem] = []
        for head in self._heads():
            batch = fill(head, self._waiting.company(head), self._config)
            if not batch.is_full and (opens_at_s := self._open_time(batch)) > now_s:
                self._wait_until(opens_at_s)
                continue
            is_due = batch.is_full or any(item.was_passed for item in batch.items)
            if self._is_open or (is_due and head.tier == 0):
                for other in passed:
                    other.was_passed = True
                return batch
            passed.append(head)
        self._all_grow = True
        return None

    def _grows(self, item: WaitingItem) -> bool:
        """Whether, while all stages have work, the batch that it is in may not go."""
        costs = self._waiting.alike(item)
        return item.tier > 0 or leaves_room(len(costs), max(costs), self._config)

    @property
    def _is_open(self) -> bool:
        """Whether a stage is without a step, so that nothing is gained by growing."""
        return len(self._in_flight) < self._config.num_stages

    def _heads(self) -> list[WaitingItem]:
        """Whose batches may be next, in order, one of each shape."""
        heads = self._waiting.heads()
        num_steps = self._tally.num_steps
        if not heads or num_steps - self._eldest_step < _STEPS_TO_ELDEST:
            return heads
        eldest = self._waiting.eldest(heads[0].request.priority)
        if eldest is None or num_steps - eldest.num_steps < _PATIENCE_STEPS:
            return heads
        return [eldest, *(h for h in heads if h.request.shape != eldest.request.shape)]

    def _wait_until(self, opens_at_s: float) -> None:
        """Let time wake the engine; but where all stages have work, only a result does."""
        if self._is_open:
            known_s = inf if self._opens_at_s is None else self._opens_at_s
            self._opens_at_s = min(opens_at_s, known_s)

    def _open_time(self, batch: ItemBatch) -> float:
        """When a batch that could take more waits no longer for others."""
        if not self._config.max_delay_s:
            return _AT_ONCE
        oldest_s = min(item.seen_s for item in batch.items if item.seen_s is not None)
        opens_at_s = oldest_s + self._config.max_delay_s
        requests = [item.request for item in batch.items]
        is_urgent = any(self._latest_start_s(request) <= opens_at_s for request in requests)
        return _AT_ONCE if is_urgent else opens_at_s

    def _latest_start_s(self, request: ItemRequest) -> float:
        """Until when it must have been planned, as far as is known what it takes."""
        if request.deadline_s is None:
            return inf
        return request.deadline_s - self._times.of(request.shape, request.cost)

    def _begin(self, batch: ItemBatch) -> None:
        if batch.items[0].place[1] == inf:
            self._eldest_step = self._tally.num_steps
        for item in batch.items:
            request = item.request
            self._leave(item)
            self._planned[request.sequence_id] = item
            self._service.admit(request.tenant, request.cost)
        self._tally.num_admitted += len(batch.items)

    def _emit(self, batch: ItemBatch, now_s: float) -> StepPlan:
        requests = [item.request for item in batch.items]
        lane = LanePlan(new=tuple(map(_introduce, requests)), rows=tuple(map(_row, requests)))
        plan = StepPlan(self._epoch, self._step, (lane,))
        self._in_flight.append(_Step(self._step, batch, now_s))
        self._step += 1
        self._tally.num_steps += 1
        self._tally.planned_prefill_tokens += batch.cost
        return plan

    def _measure(self, step: _Step, now_s: float) -> None:
        """Learn what a step took: since it was planned, or since the result before it.

        On a pipeline that is less than a step takes through all stages: still what it takes at
        least.
        """
        taken_s = now_s - max(step.planned_s, self._came_s)
        self._times.add(step.batch.items[0].request.shape, step.batch.cost, taken_s)
        self._came_s = now_s

    # The life of an item.

    def _knows(self, sequence_id: int) -> bool:
        waits = self._waiting.get(sequence_id) is not None
        return waits or sequence_id in self._planned or sequence_id in self._ended

    def _lost_items(self) -> list[WaitingItem]:
        lost = [item for batch in self._lost for item in batch.items]
        return [item for item in lost if item.request.sequence_id in self._planned]

    def _leave(self, item: WaitingItem) -> None:
        """An item waits no more."""
        request = item.request
        self._waiting.remove(item)
        self._deadlines.discard(request.sequence_id)
        if self._newest.get((request.tenant, request.stream)) is item:
            del self._newest[request.tenant, request.stream]

    def _end_waiting(self, item: WaitingItem, reason: FinishReason) -> None:
        self._leave(item)
        self._ended[item.request.sequence_id] = reason

    def _count(self, reason: EndReason) -> None:
        self._tally.finished[reason] = self._tally.finished.get(reason, 0) + 1


def _introduce(request: ItemRequest) -> NewSequence:
    return NewSequence(
        sequence_id=request.sequence_id,
        token_ids=(),
        num_prompt=0,
        sampling=SamplingSpec(),
        task="forward",
        inputs=request.inputs,
    )


def _row(request: ItemRequest) -> Row:
    cost = request.cost
    return Row(request.sequence_id, start=0, count=cost, length=cost, new_blocks=(), sample=False)
