"""Batches formed before they run: by size, by time, and never while one runs."""

from __future__ import annotations

import pytest
from tests.pure.scheduling import EOS, add, answer, begun, make_scheduler, plan, rows

from spanwise.errors import InputError
from spanwise.scheduler.scheduler import Scheduler


def batching(mode: str, **changes: object) -> Scheduler:
    return make_scheduler(**({"batching": mode, "batch_size": 3, "batch_window_s": 2.0} | changes))


def add_all(scheduler: Scheduler, *sequence_ids: int, **changes: object) -> None:
    for sequence_id in sequence_ids:
        add(scheduler, sequence_id, 3, **({"max_tokens": 2} | changes))


def test_continuous_batching_waits_for_nothing() -> None:
    scheduler = batching("continuous")
    add_all(scheduler, 1)
    assert begun(plan(scheduler)) == [1]
    add_all(scheduler, 2)
    assert begun(plan(scheduler)) == [2]
    assert scheduler.wake_at_s is None


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_full_batch_begins_at_once(mode: str) -> None:
    scheduler = batching(mode)
    add_all(scheduler, 1, 2)
    assert scheduler.next_plan(10.0) is None
    add_all(scheduler, 3, 4)
    assert begun(plan(scheduler, 10.0)) == [1, 2, 3]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_none_joins_until_all_have_ended(mode: str) -> None:
    scheduler = batching(mode, max_in_flight=1)
    add_all(scheduler, 1, 2)
    add_all(scheduler, 3, max_tokens=4)
    add_all(scheduler, 4, 5, 6)
    made = [plan(scheduler)]
    for step in range(1, 5):
        assert scheduler.wake_at_s is None
        answer(scheduler, made[-1])
        made.append(plan(scheduler, float(step)))
    assert [[row[0] for row in rows(m)] for m in made] == [
        [1, 2, 3],
        [1, 2, 3],
        [3],
        [3],
        [4, 5, 6],
    ]


def test_dynamic_begins_when_the_oldest_has_waited_long_enough() -> None:
    scheduler = batching("dynamic")
    add_all(scheduler, 1)
    assert scheduler.next_plan(10.0) is None
    assert scheduler.wake_at_s == 12.0
    add_all(scheduler, 2)
    assert scheduler.next_plan(11.9) is None
    assert scheduler.wake_at_s == 12.0
    made = plan(scheduler, 12.0)
    assert begun(made) == [1, 2]
    add_all(scheduler, 3)
    second = plan(scheduler, 12.5)
    answer(scheduler, made, EOS)
    answer(scheduler, second)
    assert scheduler.next_plan(14.0) is None
    assert scheduler.wake_at_s == 14.5
    assert begun(plan(scheduler, 14.5)) == [3]


def test_who_waited_while_a_batch_ran_begins_right_after_it() -> None:
    scheduler = batching("dynamic")
    add_all(scheduler, 1, 2, 3)
    made = plan(scheduler, 0.0)
    add_all(scheduler, 4)
    second = plan(scheduler, 1.0)
    answer(scheduler, made, EOS)
    answer(scheduler, second)
    assert begun(plan(scheduler, 5.0)) == [4]


def test_static_begins_short_only_when_for_long_none_came_and_none_ran() -> None:
    scheduler = batching("static")
    add_all(scheduler, 1)
    assert scheduler.next_plan(10.0) is None
    add_all(scheduler, 2)
    assert scheduler.next_plan(11.9) is None
    assert scheduler.wake_at_s == 13.9, "another has come"
    assert scheduler.next_plan(12.0) is None
    made = plan(scheduler, 13.9)
    assert begun(made) == [1, 2]
    add_all(scheduler, 3)
    second = plan(scheduler, 14.0)
    answer(scheduler, made, EOS)
    answer(scheduler, second)
    assert scheduler.next_plan(20.0) is None
    assert scheduler.wake_at_s == 22.0, "a batch has just run"
    assert begun(plan(scheduler, 22.0)) == [3]


def test_a_batch_that_one_step_cannot_hold_goes_on_before_any_other() -> None:
    scheduler = batching("static", max_step_tokens=4, max_in_flight=9)
    add_all(scheduler, 1, 2, 3)
    assert rows(plan(scheduler)) == [(1, 0, 3, 3, True), (2, 0, 1, 3, False)]
    add_all(scheduler, 4, 5, 6, priority=-1)
    add_all(scheduler, 7, 8, 9)
    named = [begun(plan(scheduler)) for _ in range(2)]
    assert named == [[3], []]


def test_the_first_in_turn_make_the_batch() -> None:
    scheduler = batching("dynamic", batch_size=4)
    add_all(scheduler, 1, 2, 3, tenant="a")
    add_all(scheduler, 4, tenant="b")
    add_all(scheduler, 5, tenant="b", priority=-1)
    assert begun(plan(scheduler)) == [5, 1, 2, 4]


@pytest.mark.parametrize("end", ["abort", "withdraw", "expire"])
def test_members_that_never_begin_do_not_hold_up_the_next_batch(end: str) -> None:
    scheduler = batching("static", max_num_seqs=3, max_step_tokens=3)
    add_all(scheduler, 1, 2, 3, deadline_s=1.0)
    made = plan(scheduler)
    for sequence_id in (2, 3):
        if end == "expire":
            scheduler.expire(1.0)
        else:
            getattr(scheduler, end)(sequence_id)
    add_all(scheduler, 4, 5, 6)
    answer(scheduler, made, EOS)
    assert begun(plan(scheduler, 1.0)) == [4]


def test_who_leaves_while_it_waits_fills_no_batch() -> None:
    scheduler = batching("dynamic")
    add_all(scheduler, 1, 2)
    scheduler.next_plan(0.0)
    add_all(scheduler, 3)
    scheduler.abort(1)
    scheduler.abort(3)
    assert scheduler.next_plan(0.5) is None
    assert scheduler.wake_at_s == 2.0
    scheduler.abort(2)
    assert scheduler.wake_at_s is None


def test_a_member_of_a_batch_is_withdrawn_last() -> None:
    scheduler = batching("static", max_step_tokens=3)
    add_all(scheduler, 1, 2, 3)
    plan(scheduler)
    add_all(scheduler, 4, priority=-1)
    assert scheduler.withdrawable() == [4, 3, 2]
    assert not scheduler.can_start


def test_without_a_size_a_batch_is_all_that_may_run() -> None:
    scheduler = batching("static", batch_size=None, max_num_seqs=2)
    add_all(scheduler, 1, 2, 3)
    assert begun(plan(scheduler)) == [1, 2]


def test_a_restart_changes_no_batch() -> None:
    scheduler = batching("static")
    add_all(scheduler, 1, 2, 3)
    plan(scheduler)
    add_all(scheduler, 4, 5, 6)
    scheduler.restart(1)
    assert begun(plan(scheduler)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be from 1 to max_num_seqs 8, got 0"),
        ({"batch_size": 9}, "from 1 to max_num_seqs 8, got 9"),
        ({"batch_window_s": -1.0}, "batch_window_s must be a number from 0 up, got -1"),
        ({"batch_window_s": float("nan")}, "got nan"),
        ({"batch_window_s": float("inf")}, "got inf"),
    ],
)
def test_batches_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        batching("static", **changes)
