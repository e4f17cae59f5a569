"""Callables over devices, each taking the next when it is free."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, as_completed
from typing import Any

import pytest

from spanwise import Queue
from spanwise.errors import DeadlineError, EngineError, InputError


def where(x: int, device: str) -> tuple[int, str, int]:
    return x * x, device, len(os.sched_getaffinity(0))


def test_calls_run_on_the_devices_cores_and_their_results_come() -> None:
    with Queue("cpu:2") as queue:
        assert queue.devices == ("cpu:0", "cpu:1")
        futures = {queue.submit(where, i): i for i in range(20)}
        for future in as_completed(futures, 20):
            squared, device, num_cores = future.result()
            assert squared == futures[future] ** 2 and device in queue.devices
            assert num_cores <= max(1, (os.cpu_count() or 1) // 2)
        assert queue.submit(where, 3, device="mine").result(5)[1] == "mine"
        assert queue.submit(pow, 2, 5).result(5) == 32


def test_no_device_waits_while_there_is_work() -> None:
    taken: Counter[str] = Counter()

    def work(device: str) -> None:
        time.sleep(0.04 if device == "cpu:0" else 0.01)
        taken[device] += 1

    begin_s = time.perf_counter()
    with Queue("cpu:2") as queue:
        for _ in range(50):
            queue.submit(work)
    taken_s = time.perf_counter() - begin_s
    assert sum(taken.values()) == 50
    assert taken["cpu:1"] > 2.5 * taken["cpu:0"]
    assert taken_s < 50 * 0.02, "half for each would take 1 s"


def test_what_fails_is_tried_on_another_device() -> None:
    tried: list[str] = []

    def work(device: str) -> str:
        tried.append(device)
        if device == "cpu:0":
            raise OSError("this device is broken")
        return device

    with Queue("cpu:2") as queue:
        results = {queue.submit(work, retries=1).result(10) for _ in range(20)}
        assert results == {"cpu:1"}
        with pytest.raises(OSError, match="broken"):
            queue.submit(work, needs="cpu:0", retries=2).result(10)
        assert tried[-3:] == ["cpu:0"] * 3


@pytest.fixture
def blocked() -> Any:
    """A queue of one device that is at work until it is let go."""
    gate, begun = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait(20)

    queue = Queue("cpu:1", max_pending=6)
    queue.submit(hold)
    assert begun.wait(5)
    yield queue, gate
    gate.set()
    queue.shutdown()


def test_the_urgent_first_the_late_never_and_the_cancelled_neither(blocked: Any) -> None:
    queue, gate = blocked
    order: list[str] = []
    last = queue.submit(order.append, "background", priority=1)
    second = queue.submit(order.append, "second", deadline_ms=20_000)
    first = queue.submit(order.append, "first", priority=-1)
    late = queue.submit(order.append, "late", deadline_ms=1)
    gone = queue.submit(order.append, "gone")
    assert gone.cancel()
    time.sleep(0.01)
    gate.set()
    for future in (last, second, first):
        future.result(10)
    assert order == ["first", "second", "background"]
    with pytest.raises(DeadlineError):
        late.result(10)
    with pytest.raises(CancelledError):
        gone.result(10)


def test_beyond_max_pending_submitting_waits(blocked: Any) -> None:
    queue, gate = blocked
    done: list[int] = []

    def fill() -> None:
        for number in range(12):
            queue.submit(done.append, number)

    filler = threading.Thread(target=fill)
    filler.start()
    filler.join(0.3)
    assert filler.is_alive() and not done
    gate.set()
    filler.join(10)
    queue.shutdown()
    assert done == list(range(12))


def test_a_queue_left_by_an_error_drops_what_waits() -> None:
    gate, futures = threading.Event(), []
    with pytest.raises(KeyError), Queue("cpu:1") as queue:
        futures = [queue.submit(gate.wait, 20), *(queue.submit(pow, 2, 2) for _ in range(5))]
        while not futures[0].running():
            time.sleep(0.001)
        threading.Timer(0.1, gate.set).start()
        raise KeyError
    assert futures[0].result(5) and all(future.cancelled() for future in futures[1:])
    with pytest.raises(EngineError, match="shut down"):
        queue.submit(pow, 2, 2)


def test_what_cannot_be_is_refused() -> None:
    with Queue("cpu:1") as queue:
        with pytest.raises(InputError, match=r"no device is 'cuda'; there are cpu:0"):
            queue.submit(pow, 2, 2, needs="cuda")
        with pytest.raises(InputError, match="retries"):
            queue.submit(pow, 2, 2, retries=-1)
        with pytest.raises(ZeroDivisionError):
            queue.submit(lambda: 1 // 0).result(5)
        assert queue.submit(pow, 2, 3, needs="cpu").result(5) == 8
    with pytest.raises(InputError, match="max_pending"):
        Queue("cpu:1", max_pending=0)


def test_what_fails_after_the_last_was_submitted_is_tried_elsewhere_all_the_same() -> None:
    idle = threading.Event()

    def work(device: str) -> str:
        if device == "cpu:0":
            idle.wait(5)
            raise OSError("broken")
        return device

    with Queue("cpu:2") as queue:
        future = queue.submit(work, needs="cpu:0", retries=0)
        other = queue.submit(work, retries=3)
        threading.Timer(0.2, idle.set).start()
    assert isinstance(future.exception(0), OSError)
    assert other.result(0) == "cpu:1"


def test_a_call_may_submit_to_a_queue_that_is_full() -> None:
    with Queue("cpu:1", max_pending=1) as queue:
        outer = queue.submit(lambda: queue.submit(pow, 2, 4))
        assert outer.result(10).result(10) == 16


def test_a_deadline_must_be_a_number() -> None:
    with Queue("cpu:1") as queue:
        with pytest.raises(InputError, match="deadline_ms"):
            queue.submit(pow, 2, 2, deadline_ms=float("inf"))
        assert queue.submit(pow, 2, 2, deadline_ms=1e12).result(5) == 4
