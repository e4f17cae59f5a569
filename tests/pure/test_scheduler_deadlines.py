"""Deadlines of sequences that have not begun."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.pure.scheduling import add, answer, begun, make_scheduler, plan

from spanwise.scheduler.deadlines import Deadlines
from spanwise.scheduler.update import SequenceUpdate


def test_what_has_waited_too_long_is_dropped_and_costs_no_step() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, 1, 3)
    plan(scheduler)
    add(scheduler, 2, 3, deadline_s=5.0)
    add(scheduler, 3, 3, deadline_s=4.0)
    add(scheduler, 4, 3)
    assert scheduler.wake_at_s == 4.0
    assert scheduler.expire(3.9) == []
    assert scheduler.expire(5.0) == [
        SequenceUpdate(sequence_id=3, finish_reason="deadline"),
        SequenceUpdate(sequence_id=2, finish_reason="deadline"),
    ]
    assert (scheduler.num_waiting, scheduler.wake_at_s) == (1, None)
    assert scheduler.expire(100.0) == []
    scheduler.abort(1)
    assert begun(plan(scheduler)) == [4]


@pytest.mark.parametrize("then", ["runs", "is preempted", "is restarted", "ends"])
def test_a_sequence_that_has_begun_has_no_deadline(then: str) -> None:
    scheduler = make_scheduler(num_blocks=4, max_in_flight=1)
    add(scheduler, 1, 7, max_tokens=6)
    add(scheduler, 2, 7, max_tokens=6, deadline_s=1.0)
    answer(scheduler, plan(scheduler))
    if then == "is preempted":
        answer(scheduler, plan(scheduler))
        assert plan(scheduler).lanes[0].dropped == (2,)
    elif then == "is restarted":
        scheduler.restart(1)
    elif then == "ends":
        scheduler.abort(2)
    assert scheduler.wake_at_s is None
    assert scheduler.expire(2.0) == []


@pytest.mark.parametrize("end", ["abort", "withdraw"])
def test_a_sequence_that_is_gone_has_no_deadline(end: str) -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3, deadline_s=1.0)
    getattr(scheduler, end)(1)
    assert scheduler.wake_at_s is None
    assert scheduler.expire(2.0) == []


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "discard", "look"]), st.integers(0, 20)), max_size=60
    )
)
def test_the_earliest_is_known_at_any_time(calls: list[tuple[str, int]]) -> None:
    deadlines, watched = Deadlines(), dict[int, float]()
    for call, number in calls:
        if call == "add" and number not in watched:
            watched[number] = float(number * 7 % 5)
            deadlines.add(number, watched[number])
        elif call == "discard":
            watched.pop(number, None)
            deadlines.discard(number)
        elif call == "look":
            now_s = float(number % 6)
            due = sorted((d, i) for i, d in watched.items() if d <= now_s)
            assert deadlines.passed(now_s) == [i for _, i in due]
            watched = {i: d for i, d in watched.items() if d > now_s}
        assert deadlines.next_s == min(watched.values(), default=None)


def test_what_is_gone_is_not_kept_until_its_deadline() -> None:
    deadlines = Deadlines()
    deadlines.add(0, 1.0)
    for sequence_id in range(1, 10_000):
        deadlines.add(sequence_id, 1e9)
        deadlines.discard(sequence_id)
    assert len(deadlines._heap) < 100
    assert deadlines.passed(2.0) == [0]
