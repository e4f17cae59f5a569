"""Work that waits in one line, from which free devices take."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from spanwise.scheduler.work_queue import Work, WorkQueue

BOTH = frozenset({"cpu:0", "cpu:1"})


def make(*works: dict[str, Any]) -> WorkQueue:
    queue = WorkQueue(BOTH)
    for work_id, changes in enumerate(works):
        queue.add(Work(**({"work_id": work_id, "devices": BOTH} | changes)))
    return queue


def drained(queue: WorkQueue, device: str = "cpu:0") -> list[int]:
    taken = []
    while (work_id := queue.pull(device)) is not None:
        queue.done(work_id)
        taken.append(work_id)
    return taken


def test_the_urgent_then_the_earliest_deadline_then_the_eldest() -> None:
    queue = make(
        {}, {"priority": 1}, {"deadline_s": 9.0}, {"deadline_s": 4.0}, {"priority": -1}, {}
    )
    assert drained(queue) == [4, 3, 2, 0, 5, 1]
    assert len(queue) == 0


def test_a_device_takes_only_what_it_may_do() -> None:
    queue = make({"devices": frozenset({"cpu:1"})}, {}, {"devices": frozenset({"cpu:0"})})
    assert queue.pull("cpu:0") == 1
    assert queue.pull("cpu:0") == 2
    assert queue.pull("cpu:0") is None
    assert queue.pull("cpu:1") == 0
    assert (len(queue), queue.num_waiting) == (3, 0)


def test_what_failed_is_tried_on_another_device_first_and_before_the_younger() -> None:
    queue = make({"num_retries": 2}, {}, {})
    assert queue.pull("cpu:0") == 0
    assert queue.failed(0)
    assert queue.pull("cpu:0") == 1
    assert queue.pull("cpu:1") == 0
    assert queue.failed(0)
    assert queue.pull("cpu:1") == 0, "it has failed on all: any of them again"
    assert not queue.failed(0)
    assert drained(queue, "cpu:1") == [2]


def test_with_one_device_it_is_tried_there_again() -> None:
    queue = make({"num_retries": 1, "devices": frozenset({"cpu:0"})})
    assert queue.pull("cpu:0") == 0 and queue.failed(0)
    assert queue.pull("cpu:0") == 0


def test_late_and_cancelled_work_is_not_begun() -> None:
    queue = make({"deadline_s": 5.0}, {"deadline_s": 2.0}, {}, {"deadline_s": 2.0})
    assert queue.wake_at_s == 2.0
    assert queue.cancel(3) and not queue.cancel(3)
    assert queue.late(2.0) == [1]
    assert queue.wake_at_s == 5.0
    assert queue.pull("cpu:0") == 0 and not queue.cancel(0)
    assert queue.late(99.0) == [], "it has begun"
    assert drained(queue) == [2]


@given(st.integers(0, 10_000))
def test_every_piece_ends_once_and_none_waits_while_a_device_is_free(seed: int) -> None:
    chance = random.Random(seed)
    devices = [f"cpu:{i}" for i in range(chance.randint(1, 3))]
    queue, ended, busy = WorkQueue(devices), [], dict[str, int]()
    wanted: dict[int, Work] = {}
    for now in range(60):
        if chance.random() < 0.6 and now < 40:
            may = frozenset(chance.sample(devices, chance.randint(1, len(devices))))
            late = now + chance.random() * 20 if chance.random() < 0.3 else None
            work = Work(
                work_id=now,
                devices=may,
                priority=chance.randint(0, 2),
                deadline_s=late,
                num_retries=chance.randint(0, 2),
            )
            wanted[now] = work
            queue.add(work)
        if wanted and chance.random() < 0.1 and queue.cancel(pick := chance.choice([*wanted])):
            ended.append(pick)
        ended += queue.late(now)
        for device in devices:
            if device in busy and chance.random() < 0.5:
                work_id = busy.pop(device)
                if chance.random() < 0.3:
                    ended += [] if queue.failed(work_id) else [work_id]
                else:
                    queue.done(work_id)
                    ended.append(work_id)
            if device not in busy and (pulled := queue.pull(device)) is not None:
                assert device in wanted[pulled].devices and pulled not in ended
                busy[device] = pulled
    for work_id in busy.values():
        queue.done(work_id)
        ended.append(work_id)
    while queue.num_waiting:
        pulled_now = [queue.pull(device) for device in devices]
        assert any(each is not None for each in pulled_now), "work waits, and devices are free"
        for each in pulled_now:
            if each is not None:
                queue.done(each)
                ended.append(each)
    assert sorted(ended) == sorted(wanted)
    assert len(queue) == 0
