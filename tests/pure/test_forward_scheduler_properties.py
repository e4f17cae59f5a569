"""The scheduler of forward tasks under random load, time, aborts, moves and restarts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from hypothesis import given
from hypothesis import strategies as st
from tests.pure.forward_scheduling import Devices, Ended, add, item, items

from spanwise.scheduler.forward import ForwardScheduler
from spanwise.scheduler.forward_config import ForwardConfig
from spanwise.scheduler.item import ItemRequest
from spanwise.types.plan import StepPlan


@dataclass(frozen=True)
class Job:
    """An item, when it comes, and what its caller does with it."""

    request: ItemRequest
    come_s: float
    abort_s: float = inf
    withdraw_s: float = inf


@dataclass(frozen=True)
class Case:
    """Everything a run depends on. A step takes ``own_s`` and ``item_s`` for each item."""

    config: ForwardConfig
    jobs: tuple[Job, ...]
    restarts_s: tuple[float, ...]
    own_s: float
    item_s: float

    def step_s(self, num_items: int) -> float:
        return self.own_s + self.item_s * num_items


@dataclass
class Driver:
    """Plays engine, callers and devices, and checks every plan against what it knows itself."""

    case: Case
    waiting: dict[int, ItemRequest] = field(default_factory=dict)
    lost: list[list[int]] = field(default_factory=list)
    first_steps: dict[int, int] = field(default_factory=dict)  # of those that were planned
    passed: set[int] = field(default_factory=set)  # a full batch was planned before theirs

    def __post_init__(self) -> None:
        config = self.case.config
        self.requests = {job.request.sequence_id: job.request for job in self.case.jobs}
        self.come_s = {job.request.sequence_id: job.come_s for job in self.case.jobs}
        self.newest: dict[tuple[str, str], int] = {}
        self.aborted: set[int] = set()
        self.scheduler = ForwardScheduler(config)
        self.devices = Devices(
            self.scheduler, self.case.step_s, config.num_stages, look=self.check_plan
        )

    def drive(self) -> dict[int, Ended]:
        for now_s, event, job in self._events():
            self.devices.run_until(now_s)
            self._happen(event, job)
            self.devices.feed()
            self._check_idle()
        self.devices.run_out()
        self._check_end()
        return self.devices.ended

    def _events(self) -> Iterator[tuple[float, str, Job | None]]:
        events: list[tuple[float, str, Job | None]] = [
            (at_s, "restart", None) for at_s in self.case.restarts_s
        ]
        for job in self.case.jobs:
            events += [(job.come_s, "come", job), (job.abort_s, "abort", job)]
            events += [(job.withdraw_s, "withdraw", job)]
        return iter(sorted([e for e in events if e[0] < inf], key=lambda event: event[0]))

    def _happen(self, event: str, job: Job | None) -> None:
        if job is None:
            self.lost = [ids for ids in self._unanswered() if ids]
            self.devices.restart(self.scheduler.epoch + 1)
            return
        request = job.request
        sequence_id = request.sequence_id
        if event == "come":
            self.scheduler.add(request)
            self.waiting[sequence_id] = request
            if request.stream:
                self._supersede(request)
        elif event == "abort":
            self.scheduler.abort(sequence_id)
            self.waiting.pop(sequence_id, None)
            if sequence_id not in self.devices.ended:
                self.aborted.add(sequence_id)
        else:
            self._withdraw(sequence_id)

    def _supersede(self, request: ItemRequest) -> None:
        stream = (request.tenant, request.stream)
        older = self.newest.get(stream, -1)
        if self.waiting.pop(older, None) and older in self.passed:
            self.passed.add(request.sequence_id)
        self.newest[stream] = request.sequence_id

    def _withdraw(self, sequence_id: int) -> None:
        offered = self.scheduler.withdrawable()
        waiting = {i: r for i, r in self.waiting.items() if self._may_go(r)}
        assert sorted(offered) == [i for i, request in waiting.items() if not request.stream]
        request = self.scheduler.withdraw(sequence_id)
        assert (request is not None) == (sequence_id in waiting)
        if request is not None:
            assert request == self.waiting.pop(sequence_id)
            self.aborted.add(sequence_id)

    def _unanswered(self) -> list[list[int]]:
        """The steps in flight, and those lost before and not planned again, without the aborted."""
        in_flight = [items(plan) for _, plan in self.devices.in_flight]
        return [[i for i in ids if i not in self.aborted] for ids in in_flight + self.lost]

    # What holds of every plan. The plan itself is not in flight yet.

    def check_plan(self, plan: StepPlan, now_s: float) -> None:
        config, ids = self.case.config, items(plan)
        num_before = len(self.devices.in_flight)
        assert num_before < config.max_in_flight
        assert len(set(ids)) == len(ids) and not self.aborted & set(ids)
        self._check_limits([self.requests[i] for i in ids])
        while self.lost and not any(i not in self.aborted for i in self.lost[0]):
            self.lost.pop(0)
        if self.lost:
            lost = self.lost.pop(0)
            assert ids == [i for i in lost if i not in self.aborted], "lost, or in another order"
            return
        for sequence_id in ids:
            assert sequence_id not in self.first_steps, "planned twice"
            self.first_steps[sequence_id] = len(self.first_steps)
            request = self.waiting.pop(sequence_id)
            assert request.deadline_s is None or request.deadline_s > now_s, "planned too late"
        self._check_turn(ids, num_before < config.num_stages)

    def _check_limits(self, requests: list[ItemRequest]) -> None:
        config = self.case.config
        assert 1 <= len(requests) <= config.max_batch_size
        assert len({request.shape for request in requests}) == 1
        assert len({max(0, request.priority) for request in requests}) == 1
        if config.max_batch_cost is not None:
            assert len(requests) * max(r.cost for r in requests) <= config.max_batch_cost

    def _check_turn(self, ids: list[int], is_open: bool) -> None:
        requests = [self.requests[i] for i in ids]
        others = [r for r in self.waiting.values() if self._may_go(r)]
        tier = max(0, requests[0].priority)
        assert all(max(0, other.priority) >= tier for other in others), "background went first"
        alike = [r for r in others if r.shape == requests[0].shape and max(0, r.priority) == tier]
        room = len(requests) < self.case.config.max_batch_size
        cost = max(request.cost for request in requests)
        most = self.case.config.max_batch_cost or inf
        fits = [r for r in alike if (len(ids) + 1) * max(cost, r.cost) <= most]
        if len(ids) + len(alike) <= 2 * self.case.config.max_batch_size:  # it looked at all
            assert not (room and fits), "a batch left out what it had room for"
        is_full = not room or bool(alike) or (len(ids) + 1) * cost > most
        if not is_open:
            assert tier == 0, "background work stands before what may come"
            assert is_full or set(ids) & self.passed, "a batch went that could have grown"
        self._check_order(requests, alike)
        self.passed.update(other.sequence_id for other in others)

    def _may_go(self, request: ItemRequest) -> bool:
        """Not one that the scheduler has given up for being too late, and is about to tell of."""
        return self.scheduler._waiting.get(request.sequence_id) is not None

    def _check_order(self, planned: list[ItemRequest], waiting: list[ItemRequest]) -> None:
        """Of those that are alike in all, and of no stream, the elder went first."""
        eldest: dict[tuple[object, ...], int] = {}
        for request in waiting:
            if not request.stream:
                sequence_id = request.sequence_id
                eldest[_likeness(request)] = min(
                    sequence_id, eldest.get(_likeness(request), sequence_id)
                )
        for request in planned:
            if not request.stream:
                assert request.sequence_id < eldest.get(_likeness(request), 1 << 30), "overtaken"

    def _check_idle(self) -> None:
        """Nothing waits while nothing is in flight, but for a time that is known and near."""
        scheduler, config, now_s = self.scheduler, self.case.config, self.devices.now_s
        if not scheduler.num_waiting or scheduler.num_in_flight or scheduler.wake_at_s == -inf:
            return
        wake_at_s = scheduler.wake_at_s
        assert wake_at_s is not None and now_s < wake_at_s <= now_s + config.max_delay_s

    def _check_end(self) -> None:
        scheduler, ended = self.scheduler, self.devices.ended
        assert set(ended) | self.aborted == set(self.requests)
        assert not set(ended) & self.aborted
        assert scheduler.next_plan(self.devices.now_s) is None and scheduler.wake_at_s is None
        assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_in_flight) == (0, 0, 0)
        assert scheduler.num_waiting_tokens == 0
        assert not scheduler._newest and not scheduler._deadlines._due and not scheduler._planned
        assert not scheduler._waiting._tiers and not scheduler._waiting._num_of
        reasons = defaultdict(int, {"stop": 0})
        for sequence_id, end in ended.items():
            reasons[end.reason] += 1
            self._check_reason(self.requests[sequence_id], end)
        told = {why: n for why, n in scheduler.stats.finished.items() if why != "abort"}
        assert told == {why: n for why, n in reasons.items() if n}

    def _check_reason(self, request: ItemRequest, end: Ended) -> None:
        sequence_id = request.sequence_id
        was_planned = sequence_id in self.first_steps
        assert was_planned == (end.reason == "stop")
        if end.reason == "superseded":
            newer = [
                i
                for i, other in self.requests.items()
                if (other.tenant, other.stream) == (request.tenant, request.stream)
                and self.come_s[sequence_id] <= self.come_s[i] <= end.at_s
                and i > sequence_id
            ]
            assert request.stream and newer
        elif end.reason == "deadline":
            assert request.deadline_s is not None
            done_s = end.at_s + self.case.step_s(1)
            assert done_s > request.deadline_s, "it could have made it"


def _likeness(request: ItemRequest) -> tuple[object, ...]:
    deadline_s, cost = request.deadline_s, request.cost
    return request.priority, deadline_s, request.tenant, request.shape, cost


@st.composite
def configs(draw: st.DrawFn) -> ForwardConfig:
    num_stages = draw(st.integers(1, 3))
    return ForwardConfig(
        max_batch_size=draw(st.integers(1, 5)),
        max_batch_cost=draw(st.sampled_from([None, None, 8, 12, 20])),
        max_delay_s=draw(st.sampled_from([0.0, 0.0, 0.5, 2.0])),
        num_stages=num_stages,
        max_in_flight=num_stages + draw(st.integers(0, 3)),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seed = draw(st.integers(0, 1 << 30))
    num_jobs = draw(st.integers(1, 40))
    spread_s = draw(st.sampled_from([0.0, 5.0, 30.0, 100.0]))
    variety = draw(st.integers(1, 3))
    return Case(
        config=draw(configs()),
        jobs=tuple(_jobs(random.Random(seed), num_jobs, spread_s, variety)),
        restarts_s=tuple(draw(st.lists(st.floats(0.1, 40.0), max_size=2))),
        own_s=draw(st.sampled_from([0.1, 1.0])),
        item_s=draw(st.sampled_from([0.0, 0.1, 1.0])),
    )


def _jobs(draw: random.Random, num_jobs: int, spread_s: float, variety: int) -> Iterator[Job]:
    comes_s = sorted(round(draw.random() * spread_s, 2) for _ in range(num_jobs))
    for sequence_id, come_s in enumerate(comes_s):
        due_s = draw.choice([None, None, come_s + draw.choice([0.0, 0.5, 2.0, 9.0])])
        request = item(
            sequence_id,
            shape=("row", draw.randrange(variety)),
            cost=draw.choice([1, 1, 2, 3, 8]),
            priority=draw.choice([0, 0, 0, -1, 1, 2]),
            tenant="abc"[draw.randrange(variety)],
            deadline_s=due_s,
            stream=draw.choice(["", "", "", "camera", "door"]),
        )
        later_s = come_s + draw.random() * 5
        yield Job(
            request,
            come_s,
            abort_s=later_s if draw.random() < 0.1 else inf,
            withdraw_s=later_s if draw.random() < 0.1 else inf,
        )


@given(cases())
def test_every_item_ends_once_and_every_batch_keeps_the_limits(case: Case) -> None:
    Driver(case).drive()


@given(cases())
def test_the_same_events_give_the_same_steps(case: Case) -> None:
    one, other = Driver(case), Driver(case)
    assert one.drive() == other.drive()
    assert one.devices.steps == other.devices.steps


_dues = st.lists(
    st.tuples(st.floats(0, 5), st.integers(-1, 0), st.integers(1, 30)), min_size=1, max_size=40
)


@given(_dues)
def test_one_at_a_time_the_earliest_deadline_is_first(wanted: list[tuple[float, int, int]]) -> None:
    scheduler = ForwardScheduler(ForwardConfig(max_batch_size=1))
    waiting: dict[int, tuple[int, float, int]] = {}

    def look(plan: StepPlan, now_s: float) -> None:
        (sequence_id,) = items(plan)
        place = waiting.pop(sequence_id)
        assert now_s < place[1]
        assert place == min([place, *(w for w in waiting.values() if w[1] > now_s)])

    devices = Devices(scheduler, lambda num_items: 0.5, look=look)
    for sequence_id, (gap_s, priority, due_in_s) in enumerate(wanted):
        devices.run_until(devices.now_s + gap_s)
        due_s = devices.now_s + due_in_s
        add(scheduler, sequence_id, deadline_s=due_s, priority=priority)
        waiting[sequence_id] = (priority, due_s, sequence_id)
        devices.feed()
    devices.run_out()
    reasons = [devices.ended[i].reason for i in range(len(wanted))]
    assert all(reason == "deadline" for i, reason in enumerate(reasons) if i in waiting)


@given(st.data())
def test_no_shape_starves_and_no_tenant(data: st.DataObject) -> None:
    """A flood of full batches holds up a single item of another shape for a few steps at most."""
    num_stages = data.draw(st.integers(1, 3))
    config = ForwardConfig(
        max_batch_size=4,
        num_stages=num_stages,
        max_in_flight=num_stages + data.draw(st.integers(1, 3)),
        max_delay_s=data.draw(st.sampled_from([0.0, 0.5])),
    )
    scheduler = ForwardScheduler(config)
    devices = Devices(scheduler, lambda num_items: 1.0, num_stages)
    flood = iter(range(1000, 10_000))
    lonely_at = data.draw(st.integers(5, 20))
    for number in range(40):
        add(scheduler, *(next(flood) for _ in range(8)), shape="flood", tenant="big")
        devices.feed()
        if number == lonely_at:
            add(scheduler, 1, shape="lonely", tenant="small")
            devices.feed()
        devices.run_until(devices.now_s + 1.0)
    before = [ids for at_s, ids in devices.steps if at_s > lonely_at]
    # One has less right to be first, and one is full; while it waits for others, time passes.
    assert before.index([1]) <= 2 + 2 * config.max_delay_s * num_stages
