"""The scheduler of forward tasks, by examples."""

from __future__ import annotations

import random
from math import inf

import pytest
from tests.pure.forward_scheduling import (
    Devices,
    add,
    answer,
    item,
    items,
    make_scheduler,
    outputs,
    planned,
    result_of,
    run_step,
)

from spanwise.errors import InputError
from spanwise.scheduler.forward import ForwardScheduler
from spanwise.scheduler.forward_config import ForwardConfig
from spanwise.scheduler.least_times import LeastTimes
from spanwise.scheduler.policy import Policy
from spanwise.scheduler.scheduler import Scheduler
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import (
    LanePlan,
    LaneResult,
    NewSequence,
    Row,
    Sampled,
    StepPlan,
    StepResult,
)
from spanwise.types.sampling import SamplingSpec

# --- plans and results


def test_a_step_introduces_its_items_and_has_a_row_of_each() -> None:
    scheduler = make_scheduler()
    add(scheduler, 5, cost=3)
    add(scheduler, 8, cost=2)
    assert scheduler.next_plan() == StepPlan(
        0,
        0,
        (
            LanePlan(
                dropped=(),
                new=tuple(
                    NewSequence(i, (), 0, SamplingSpec(), "forward", item(i).inputs) for i in (5, 8)
                ),
                rows=(Row(5, 0, 3, 3, (), False), Row(8, 0, 2, 2, (), False)),
            ),
        ),
    )


def test_every_item_gets_its_outputs() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 2)
    made = scheduler.next_plan()
    assert made is not None
    assert answer(scheduler, made) == [
        SequenceUpdate(sequence_id=i, outputs=outputs(item(i).inputs), finish_reason="stop")
        for i in (1, 2)
    ]
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_in_flight) == (0, 0, 0)
    assert scheduler.next_plan() is None


def test_an_engine_can_use_either_scheduler() -> None:
    asked = [name for name in vars(Policy) if not name.startswith("_")]
    assert "next_plan" in asked and "wake_at_s" in asked
    for policy in (Scheduler, ForwardScheduler):
        assert [name for name in asked if not hasattr(policy, name)] == []


def test_what_is_at_hand_is_counted() -> None:
    scheduler = make_scheduler(max_batch_size=2, max_in_flight=1)
    add(scheduler, 1, 2, cost=5)
    add(scheduler, 3, cost=4)
    add(scheduler, 4, deadline_s=1.0)
    made = scheduler.next_plan()
    assert made is not None
    stats = scheduler.stats
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (2, 2, 5 + 5)
    answer(scheduler, made)
    assert items(made) == [4, 3]
    assert scheduler.expire(2.0) == []
    run_step(scheduler, 2.0)
    stats = scheduler.stats
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (0, 0, 0)
    assert (stats.num_steps, stats.num_admitted, stats.finished) == (2, 4, {"stop": 4})
    assert stats.planned_prefill_tokens == 2 * 4 + 2 * 5


# --- limits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"max_batch_cost": 0}, "max_batch_cost must be at least 1, got 0"),
        ({"num_stages": 0}, "num_stages must be at least 1, got 0"),
        ({"num_stages": 3}, "max_in_flight must be at least 3, got 2"),
        ({"max_delay_s": -0.1}, "max_delay_s must be a number from 0 up, got -0.1"),
        ({"max_delay_s": inf}, "max_delay_s must be a number from 0 up, got inf"),
    ],
)
def test_a_limit_that_leaves_no_way_to_run_is_refused(
    changes: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ForwardConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cost", "message"), [(0, "at least 1, got 0"), (11, "costs 11, more than max_batch_cost 10")]
)
def test_an_item_that_could_never_run_is_refused(cost: int, message: str) -> None:
    scheduler = make_scheduler(max_batch_cost=10)
    with pytest.raises(InputError, match=message):
        scheduler.add(item(1, cost=cost))
    assert scheduler.num_waiting == 0
    add(scheduler, 1, cost=10)
    assert planned(scheduler) == [1]


def test_a_batch_holds_items_of_one_shape_up_to_its_size() -> None:
    scheduler = make_scheduler(max_batch_size=3)
    for sequence_id in range(8):
        add(scheduler, sequence_id, shape=("even", "odd")[sequence_id % 2])
    steps = [run_step(scheduler) for _ in range(4)]
    assert steps == [[0, 2, 4], [1, 3, 5], [6], [7]]


def test_a_batch_costs_what_its_largest_item_costs_times_its_items() -> None:
    scheduler = make_scheduler(max_batch_size=10, max_batch_cost=24)
    for sequence_id, cost in enumerate([6, 6, 6, 6, 6]):
        add(scheduler, sequence_id, cost=cost)
    assert run_step(scheduler) == [0, 1, 2, 3]
    add(scheduler, 5, cost=13)
    assert run_step(scheduler) == [4]  # two of 13 would be too much
    assert run_step(scheduler) == [5]


def test_who_joins_counts_as_much_as_the_largest_there_is() -> None:
    scheduler = make_scheduler(max_batch_size=10, max_batch_cost=24)
    for sequence_id, cost in enumerate([5, 9, 8]):
        add(scheduler, sequence_id, cost=cost, deadline_s=9.0 + sequence_id)
    assert [run_step(scheduler) for _ in range(2)] == [[0, 1], [2]]


def test_who_does_not_fit_lets_others_pass_and_is_next() -> None:
    scheduler = make_scheduler(max_batch_size=10, max_batch_cost=20)
    add(scheduler, 0, cost=5)
    add(scheduler, 1, cost=12)
    add(scheduler, 2, 3, 4, 5, cost=5)
    assert run_step(scheduler) == [0, 2, 3, 4]
    assert run_step(scheduler) == [1]
    assert run_step(scheduler) == [5]


def test_a_batch_is_filled_with_what_wastes_least() -> None:
    scheduler = make_scheduler(max_batch_size=3)
    for sequence_id, cost in enumerate([10, 2, 9, 3, 11]):
        add(scheduler, sequence_id, cost=cost)
    assert [sorted(run_step(scheduler)) for _ in range(2)] == [[0, 2, 4], [1, 3]]


def test_what_is_due_sooner_is_not_passed_by_what_wastes_less() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    add(scheduler, 0, cost=10, deadline_s=1.0)
    add(scheduler, 1, cost=10, deadline_s=3.0)
    add(scheduler, 2, cost=1, deadline_s=2.0)
    assert run_step(scheduler) == [0, 2]


# --- order


def test_priority_comes_first_then_the_deadline_and_none_is_last() -> None:
    scheduler = make_scheduler(max_batch_size=1, max_in_flight=10)
    add(scheduler, 0)
    add(scheduler, 1, deadline_s=9.0)
    add(scheduler, 2, deadline_s=5.0)
    add(scheduler, 3)
    add(scheduler, 4, priority=-1)
    add(scheduler, 5, priority=-1, deadline_s=20.0)
    assert [planned(scheduler) for _ in range(6)] == [[5], [4], [2], [1], [0], [3]]


def test_a_tenant_with_little_service_is_before_one_that_came_earlier() -> None:
    scheduler = make_scheduler(max_batch_size=1, max_in_flight=10)
    add(scheduler, 0, 1, 2, 3, tenant="a")
    add(scheduler, 4, 5, tenant="b")
    assert [planned(scheduler) for _ in range(6)] == [[0], [4], [1], [5], [2], [3]]


def test_service_is_what_items_cost() -> None:
    scheduler = make_scheduler(max_batch_size=1, max_in_flight=10)
    add(scheduler, 0, 1, tenant="a", cost=3)
    add(scheduler, 2, 3, 4, 5, tenant="b", cost=1)
    assert [planned(scheduler) for _ in range(6)] == [[0], [2], [3], [4], [1], [5]]


def test_tenants_share_a_batch_too() -> None:
    scheduler = make_scheduler(max_batch_size=4)
    add(scheduler, 0, 1, 2, 3, 4, tenant="a")
    add(scheduler, 5, 6, 7, 8, 9, tenant="b")
    assert run_step(scheduler) == [0, 5, 1, 6]


def test_time_without_demand_earns_a_tenant_nothing() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    add(scheduler, *range(10), tenant="a")
    assert [run_step(scheduler) for _ in range(6)] == [[i] for i in range(6)]
    add(scheduler, 10, 11, 12, tenant="b")
    assert [run_step(scheduler) for _ in range(4)] == [[6], [10], [7], [11]]


def test_deadlines_do_not_starve_those_who_have_none() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    add(scheduler, 0, 1, shape="none")
    steps = []
    for number in range(2, 100):
        add(scheduler, number, shape="due", deadline_s=1000.0 + number)
        steps += run_step(scheduler)
    begun = [steps.index(sequence_id) for sequence_id in (0, 1)]
    assert begun == [64, 72]


def test_what_is_more_urgent_may_starve_what_is_less() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    add(scheduler, 0)
    for number in range(1, 100):
        add(scheduler, number, priority=-1, deadline_s=1000.0)
        assert run_step(scheduler) == [number]
    assert run_step(scheduler) == [0]


# --- growing while devices are busy


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_a_batch_grows_while_every_stage_has_a_step(num_stages: int) -> None:
    scheduler = make_scheduler(num_stages=num_stages, max_in_flight=num_stages + 1)
    plans = []
    for sequence_id in range(num_stages):
        assert scheduler.can_start
        add(scheduler, sequence_id)
        plans.append(scheduler.next_plan())
        assert items(plans[-1]) == [sequence_id]
    assert not scheduler.can_start
    add(scheduler, 10, 11, 12)
    assert scheduler.next_plan() is None
    assert scheduler.wake_at_s is None
    assert plans[0] is not None
    answer(scheduler, plans[0])
    assert planned(scheduler) == [10, 11, 12]


def test_a_full_batch_goes_ahead_until_the_window_is_full() -> None:
    scheduler = make_scheduler(max_in_flight=3)
    add(scheduler, *range(20))
    assert [len(planned(scheduler)) for _ in range(4)] == [4, 4, 4, 0]
    assert scheduler.num_in_flight == 3


@pytest.mark.parametrize(("max_batch_cost", "num_more"), [(None, 4), (20, 3), (22, 3), (24, 4)])
def test_a_batch_that_has_grown_full_goes_ahead(max_batch_cost: int | None, num_more: int) -> None:
    scheduler = make_scheduler(max_batch_cost=max_batch_cost)
    add(scheduler, 0)
    assert planned(scheduler) == [0]
    add(scheduler, *range(90, 96), priority=1)
    for sequence_id in range(1, num_more + 1):
        assert planned(scheduler) == []
        add(scheduler, sequence_id, cost=6)
    assert planned(scheduler) == list(range(1, num_more + 1))


@pytest.mark.parametrize("joined", [False, True])
def test_a_growing_batch_is_passed_by_full_ones_only_once(joined: bool) -> None:
    scheduler = make_scheduler(max_batch_size=3)
    add(scheduler, 0, 1, 10, shape="a")
    first = scheduler.next_plan()
    add(scheduler, 2, shape="b")
    add(scheduler, 3, 4, 5, 6, 8, 9, shape="a")
    assert planned(scheduler) == [3, 4, 5]
    assert first is not None
    answer(scheduler, first)
    assert scheduler.num_in_flight == 1
    if joined:
        add(scheduler, 7, shape="b", deadline_s=9.0)
    assert planned(scheduler) == ([7, 2] if joined else [2])


# --- waiting for company


def test_a_batch_waits_for_others_until_its_oldest_has_waited_long_enough() -> None:
    scheduler = make_scheduler(max_delay_s=1.0)
    add(scheduler, 0)
    assert planned(scheduler, 10.0) == []
    assert scheduler.wake_at_s == 11.0
    add(scheduler, 1)
    assert planned(scheduler, 10.9) == []
    assert scheduler.wake_at_s == 11.0
    assert planned(scheduler, 11.0) == [0, 1]
    assert scheduler.wake_at_s is None


def test_a_full_batch_does_not_wait() -> None:
    scheduler = make_scheduler(max_delay_s=1.0)
    add(scheduler, 0, shape="other")
    add(scheduler, 1, 2, 3, 4)
    assert planned(scheduler, 10.0) == [1, 2, 3, 4]
    assert planned(scheduler, 10.0) == []
    assert scheduler.wake_at_s is None  # the stage has work, for as long as it has
    scheduler = make_scheduler(max_delay_s=1.0, max_batch_cost=10)
    add(scheduler, 0, 1, cost=4)
    assert planned(scheduler, 10.0) == [0, 1]


def test_a_batch_that_leaves_one_out_does_not_wait() -> None:
    scheduler = make_scheduler(max_delay_s=1.0, max_batch_cost=20)
    add(scheduler, 0, cost=5)
    add(scheduler, 1, cost=12)
    assert planned(scheduler, 10.0) == [0]


def test_a_batch_does_not_wait_where_a_deadline_is_nearer() -> None:
    scheduler = make_scheduler(max_delay_s=1.0)
    add(scheduler, 0)
    assert planned(scheduler, 10.0) == []
    add(scheduler, 1, deadline_s=11.5)
    assert planned(scheduler, 10.2) == []
    assert scheduler.wake_at_s == 11.0
    add(scheduler, 2, deadline_s=10.9)
    assert planned(scheduler, 10.3) == [2, 1, 0]


def test_a_clock_that_begins_at_0_wakes_too() -> None:
    scheduler = make_scheduler(max_delay_s=1.0)
    add(scheduler, 0, shape="a")
    assert planned(scheduler, -1.0) == []
    add(scheduler, 1, shape="b")
    assert planned(scheduler, -0.5) == []
    assert scheduler.wake_at_s == 0.0


# --- deadlines


def test_what_is_too_late_costs_no_step_and_is_told_of() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, deadline_s=5.0)
    add(scheduler, 1, deadline_s=4.0)
    add(scheduler, 2)
    assert scheduler.wake_at_s == 4.0
    assert scheduler.expire(3.9) == []
    assert planned(scheduler, 5.0) == [2]
    assert scheduler.wake_at_s == -inf
    assert scheduler.expire(5.0) == [
        SequenceUpdate(sequence_id=1, finish_reason="deadline"),
        SequenceUpdate(sequence_id=0, finish_reason="deadline"),
    ]
    assert scheduler.wake_at_s is None
    assert scheduler.expire(9.0) == []
    assert scheduler.stats.num_expired == 2


@pytest.mark.parametrize("then", ["is restarted", "is withdrawn", "ends"])
def test_a_deadline_holds_until_the_step_is_planned(then: str) -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, deadline_s=5.0)
    if then == "is withdrawn":
        scheduler.withdraw(0)
    elif then == "ends":
        scheduler.abort(0)
    else:
        assert planned(scheduler, 4.9) == [0]
        scheduler.restart(1)
    assert scheduler.wake_at_s is None
    assert scheduler.expire(6.0) == []
    assert planned(scheduler, 6.0) == ([0] if then == "is restarted" else [])


def _learnt(num_steps: int, taken_s: float) -> ForwardScheduler:
    scheduler = make_scheduler()
    for sequence_id in range(num_steps):
        add(scheduler, sequence_id, cost=4)
        run_step(scheduler, 100.0 * sequence_id, taken_s)
    return scheduler


def test_what_cannot_be_done_in_time_costs_no_step() -> None:
    scheduler = _learnt(3, taken_s=10.0)
    add(scheduler, 50, cost=4, deadline_s=1008.0)
    add(scheduler, 51, cost=4, deadline_s=1011.0)
    assert planned(scheduler, 1000.0) == [51]
    assert scheduler.expire(1000.0) == [SequenceUpdate(sequence_id=50, finish_reason="deadline")]


@pytest.mark.parametrize("change", ["few steps", "another shape", "small", "faster", "slower"])
def test_what_could_be_done_in_time_is_planned(change: str) -> None:
    scheduler = _learnt(2 if change == "few steps" else 3, taken_s=10.0)
    if change == "faster":
        add(scheduler, 40, 41, 42, 43, cost=5)
        assert run_step(scheduler, 900.0, 1.0) == [40, 41, 42, 43]
    if change == "slower":
        for sequence_id, taken_s in ((40, 1.0), (41, 20.0)):
            add(scheduler, sequence_id, cost=4)
            run_step(scheduler, 10.0 * sequence_id, taken_s)
    shape = "other" if change == "another shape" else ()
    add(scheduler, 50, cost=1 if change == "small" else 4, deadline_s=1003.0, shape=shape)
    assert planned(scheduler, 1000.0) == [50]


def test_what_was_hopeless_when_it_came_is_asked_again_when_it_would_be_dropped() -> None:
    scheduler = _learnt(3, taken_s=10.0)
    add(scheduler, 40, 41, 42, 43, cost=4)
    made = scheduler.next_plan(900.0)
    assert made is not None
    add(scheduler, 50, cost=4, deadline_s=930.0)
    assert scheduler.wake_at_s == 921.0
    answer(scheduler, made, 902.0)
    assert scheduler.expire(921.0) == []
    assert scheduler.wake_at_s == pytest.approx(928.2)
    assert planned(scheduler, 921.0) == [50]


def test_one_of_eight_that_seem_too_late_is_tried() -> None:
    scheduler = _learnt(3, taken_s=10.0)
    add(scheduler, *range(50, 66), cost=4, deadline_s=1003.0)
    assert planned(scheduler, 1000.0) == [57, 65]
    assert len(scheduler.expire(1000.0)) == 14


def test_what_is_too_late_for_sure_is_not_tried() -> None:
    scheduler = make_scheduler()
    add(scheduler, *range(20), deadline_s=3.0)
    assert planned(scheduler, 3.0) == []
    assert len(scheduler.expire(3.0)) == 20


def test_a_step_that_had_to_wait_for_another_took_less() -> None:
    scheduler = make_scheduler(max_batch_size=1, max_in_flight=3)
    add(scheduler, 0, 1, 2)
    for number, made in enumerate([scheduler.next_plan(0.0) for _ in range(3)]):
        assert made is not None
        answer(scheduler, made, 10.0 + number)
    add(scheduler, 3, deadline_s=101.5)
    assert planned(scheduler, 100.0) == [3]


def test_least_times_are_kept_of_the_shapes_seen_lately() -> None:
    times = LeastTimes()
    for shape in range(2000):
        for _ in range(3):
            times.add(shape, 1, 1.0)
    assert len(times._known) == 1024
    assert (times.of(0, 1), times.of(1999, 1)) == (0.0, 0.9)


# --- streams


def test_a_newer_item_of_a_stream_ends_the_older_one_that_waits() -> None:
    scheduler = make_scheduler(max_in_flight=1)
    add(scheduler, 0, stream="camera")
    made = scheduler.next_plan()
    assert items(made) == [0]
    add(scheduler, 1, stream="camera", deadline_s=3.0)
    add(scheduler, 2, stream="door")
    add(scheduler, 3, stream="camera", tenant="other")
    add(scheduler, 4, 5)
    assert scheduler.wake_at_s == 3.0
    add(scheduler, 6, stream="camera")
    assert scheduler.wake_at_s == -inf
    superseded = SequenceUpdate(sequence_id=1, finish_reason="superseded")
    assert scheduler.expire(0.0) == [superseded]
    assert scheduler.wake_at_s is None
    assert made is not None
    assert [update.sequence_id for update in answer(scheduler, made)] == [0]
    assert sorted(planned(scheduler)) == [2, 3, 4, 6]
    assert scheduler.stats.finished == {"superseded": 1, "stop": 1}


@pytest.mark.parametrize("deadlines", [False, True])
def test_a_stream_is_served_however_fast_its_items_come(deadlines: bool) -> None:
    scheduler = make_scheduler(max_batch_size=1)
    served = []
    add(scheduler, 0, 1, 2, deadline_s=50.0 if deadlines else None)
    for number in range(10, 20):
        due_s = 50.0 + number if deadlines else None
        add(scheduler, number, stream="camera", deadline_s=due_s)
        add(scheduler, number + 100, deadline_s=due_s)
        served += run_step(scheduler)
    assert [number for number in served if 10 <= number < 20] == [13, 18]


def test_a_batch_waits_no_longer_because_its_item_was_superseded() -> None:
    scheduler = make_scheduler(max_delay_s=1.0)
    for number in range(5):
        add(scheduler, number, stream="camera")
        assert planned(scheduler, number / 5) == []
        assert not number or scheduler.expire(number / 5)
        assert scheduler.wake_at_s == 1.0
    assert planned(scheduler, 1.0) == [4]


def test_items_of_a_stream_stay_where_the_next_one_comes() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, stream="camera")
    add(scheduler, 1)
    assert scheduler.withdrawable() == [1]


def test_a_superseded_item_that_is_aborted_is_not_told_of() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 1, stream="camera")
    scheduler.abort(0)
    assert scheduler.expire(0.0) == []
    assert scheduler.stats.finished == {"abort": 1}


# --- the end of items, restarts


def test_an_aborted_item_is_heard_of_no_more() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    add(scheduler, 0, 1, 2, deadline_s=9.0)
    made = scheduler.next_plan()
    for sequence_id in (1, 2, 1, 77):
        scheduler.abort(sequence_id)
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    assert made is not None
    assert [update.sequence_id for update in answer(scheduler, made)] == [0]
    scheduler.abort(0)
    assert scheduler.stats.finished == {"abort": 2, "stop": 1}
    assert (scheduler.next_plan(), scheduler.wake_at_s) == (None, None)


def test_what_was_in_flight_is_planned_again_first_in_its_order() -> None:
    scheduler = make_scheduler(max_batch_size=2, max_in_flight=3)
    add(scheduler, *range(7))
    before = [scheduler.next_plan() for _ in range(3)]
    assert [items(made) for made in before] == [[0, 1], [2, 3], [4, 5]]
    assert before[0] is not None and before[1] is not None
    answer(scheduler, before[0])
    scheduler.restart(2)
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_in_flight) == (5, 0, 0)
    assert not scheduler.can_start
    add(scheduler, 8, priority=-5)
    scheduler.abort(3)
    assert answer(scheduler, before[1]) == []
    after = [scheduler.next_plan() for _ in range(3)]
    assert [items(made) for made in after] == [[2], [4, 5], [8, 6]]
    assert [(made.epoch, made.step) for made in after if made] == [(2, 0), (2, 1), (2, 2)]
    assert after[0] is not None
    assert [update.sequence_id for update in answer(scheduler, after[0])] == [2]


def test_a_second_restart_loses_nothing_either() -> None:
    scheduler = make_scheduler(max_batch_size=1, max_in_flight=3)
    add(scheduler, *range(5))
    assert [planned(scheduler) for _ in range(3)] == [[0], [1], [2]]
    scheduler.restart(1)
    assert [planned(scheduler) for _ in range(2)] == [[0], [1]]
    scheduler.restart(2)
    assert [run_step(scheduler) for _ in range(5)] == [[0], [1], [2], [3], [4]]


def test_a_restart_does_not_charge_a_tenant_again() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    add(scheduler, 0, 1, tenant="a", cost=5)
    add(scheduler, 2, 3, tenant="b", cost=6)
    assert planned(scheduler) == [0]
    for epoch in (1, 2, 3):
        scheduler.restart(epoch)
        assert planned(scheduler) == [0]
    scheduler.restart(4)
    assert [run_step(scheduler) for _ in range(4)] == [[0], [2], [1], [3]]


def test_the_least_urgent_is_withdrawn_first() -> None:
    scheduler = make_scheduler(max_batch_size=1, max_in_flight=1)
    add(scheduler, 0, deadline_s=5.0)
    add(scheduler, 1)
    add(scheduler, 2, deadline_s=3.0)
    add(scheduler, 3, priority=1)
    assert planned(scheduler) == [2]
    assert scheduler.withdrawable() == [3, 1, 0]
    assert scheduler.withdraw(2) is None
    assert scheduler.withdraw(1) == item(1)
    assert scheduler.withdraw(1) is None
    assert scheduler.num_waiting == 2
    assert scheduler.stats.finished == {}


# --- background work


def test_background_work_waits_while_anything_else_waits() -> None:
    scheduler = make_scheduler(max_batch_size=2, max_delay_s=1.0)
    add(scheduler, 0, 1, priority=1)
    add(scheduler, 2, 3, priority=2)
    add(scheduler, 4, shape="urgent")
    assert planned(scheduler, 0.0) == []
    assert [run_step(scheduler, 1.0) for _ in range(3)] == [[4], [0, 1], [2, 3]]


def test_background_work_does_not_ride_with_urgent_work() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, priority=1)
    add(scheduler, 1, priority=0)
    add(scheduler, 2, priority=-1)
    assert [run_step(scheduler) for _ in range(2)] == [[2, 1], [0]]


@pytest.mark.parametrize("num_stages", [1, 2])
def test_background_work_leaves_the_window_to_urgent_work(num_stages: int) -> None:
    scheduler = make_scheduler(num_stages=num_stages, max_in_flight=num_stages + 2)
    add(scheduler, *range(40), priority=1)
    for _ in range(num_stages):
        assert len(planned(scheduler)) == 4
    assert planned(scheduler) == []
    add(scheduler, 50, 51, 52, 53)
    assert planned(scheduler) == [50, 51, 52, 53]


# --- on a clock


def _step_s(num_items: int) -> float:
    return 1.0 + 0.1 * num_items


def _serve(devices: Devices, arrivals_s: list[float], **changes: object) -> list[float]:
    """What each item took from its coming to its outputs."""
    for sequence_id, come_s in enumerate(arrivals_s):
        devices.run_until(come_s)
        add(devices.scheduler, sequence_id, **changes)
        devices.feed()
    devices.run_out()
    assert {ended.reason for ended in devices.ended.values()} == {"stop"}
    return [devices.ended[i].at_s - come_s for i, come_s in enumerate(arrivals_s)]


def _poisson(rate: float, num_items: int) -> list[float]:
    draw, now_s = random.Random(5), 0.0
    return [now_s := now_s + draw.expovariate(rate) for _ in range(num_items)]


@pytest.mark.parametrize("max_delay_s", [0.0, 0.5])
def test_batches_serve_more_than_twice_what_saturates_single_items(max_delay_s: float) -> None:
    arrivals_s = _poisson(2.5 / _step_s(1), 3000)
    alone = Devices(make_scheduler(max_batch_size=1), _step_s)
    _serve(alone, arrivals_s)
    batched = Devices(make_scheduler(max_batch_size=32, max_delay_s=max_delay_s), _step_s)
    taken_s = _serve(batched, arrivals_s)
    assert alone.now_s / batched.now_s >= 2
    # Who comes waits for at most the step in flight, and then takes its own.
    sizes = [len(step) for _, step in batched.steps]
    longest = sorted(sizes)[int(0.99 * len(sizes))]
    p99_s = sorted(taken_s)[int(0.99 * len(taken_s))]
    assert longest < 16
    assert p99_s <= max_delay_s + 2 * _step_s(longest)


def test_no_stage_is_idle_while_more_waits_than_a_batch() -> None:
    devices = Devices(make_scheduler(max_batch_size=8, num_stages=2, max_in_flight=3), _step_s, 2)
    add(devices.scheduler, *range(80))
    devices.feed()
    devices.run_out()
    assert len(devices.ended) == 80
    assert devices.now_s == pytest.approx((10 + 1) * _step_s(8) / 2)


def test_urgent_items_wait_for_one_step_of_background_work_at_most() -> None:
    devices = Devices(make_scheduler(max_batch_size=8), _step_s)
    add(devices.scheduler, *range(10_000, 10_400), priority=1)
    taken_s = _serve(devices, _poisson(0.2, 40))
    assert max(taken_s) <= _step_s(8) + _step_s(2)
    assert len(devices.ended) == 440


def test_a_lonely_item_is_served_at_once() -> None:
    devices = Devices(make_scheduler(max_batch_size=32), _step_s)
    assert _serve(devices, [0.0, 5.0, 10.0]) == pytest.approx([_step_s(1)] * 3)


def test_a_result_of_another_step_is_refused() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    add(scheduler, 0, 1)
    scheduler.next_plan()
    second = scheduler.next_plan()
    assert second is not None
    with pytest.raises(AssertionError, match="step 1 came before step 0"):
        scheduler.accept(result_of(second))


def _failed(plan: StepPlan, poison: int) -> StepResult:
    """What ranks answer that cannot compute a batch with one of its items."""
    is_bad = poison in items(plan)
    good = result_of(plan).lanes[0].sampled
    bad = tuple(Sampled(each.sequence_id, error="too odd") for each in good)
    return StepResult(plan.epoch, plan.step, (LaneResult(bad if is_bad else good),))


def test_of_a_batch_that_fails_only_the_item_to_blame_ends_with_the_error() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 1, 2, 3, 4, 5)
    ended = {}
    while (plan := scheduler.next_plan(0.0)) is not None:
        for update in scheduler.accept(_failed(plan, 2), 0.0):
            assert update.sequence_id not in ended
            ended[update.sequence_id] = (update.finish_reason, update.error)
            assert (update.outputs is None) == (update.finish_reason == "error")
    assert ended.pop(2) == ("error", "too odd")
    assert ended == dict.fromkeys((0, 1, 3, 4, 5), ("stop", ""))
    assert scheduler.stats.finished == {"error": 1, "stop": 5}
    assert scheduler.num_waiting == scheduler.num_running == scheduler.num_in_flight == 0


def test_who_was_computed_with_an_item_to_blame_comes_before_all_others() -> None:
    scheduler = make_scheduler(max_in_flight=1)
    add(scheduler, 0, 1)
    plan = scheduler.next_plan(0.0)
    assert plan is not None
    add(scheduler, 2, 3, priority=-1)
    assert scheduler.accept(_failed(plan, 1), 0.0) == []
    scheduler.abort(0)
    assert planned(scheduler) == [1]
