from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.control.admission import (
    MAX_RETRY_S,
    MIN_QUEUE,
    MIN_RETRY_S,
    Admission,
    AdmissionLimits,
)
from spanwise.control.drain import DrainRate
from spanwise.errors import InputError


def admission(requests: int = 4, tokens: int | None = None, tenant: int | None = None) -> Admission:
    return Admission(
        AdmissionLimits(
            max_waiting_requests=requests, max_waiting_tokens=tokens, max_requests_per_tenant=tenant
        )
    )


def fill(door: Admission, count: int, tokens: int = 10, now_s: float = 0.0) -> None:
    for request_id in range(count):
        assert door.admit(request_id, f"tenant {request_id}", tokens, now_s) is None


# --- limits


def test_the_queue_is_bounded_in_requests() -> None:
    door = admission(requests=2)
    fill(door, 2)
    refusal = door.admit(2, "", 1, 0.0)
    assert refusal is not None
    assert refusal.kind == "server"
    assert refusal.message.startswith("2 requests wait, max_waiting_requests is 2; ")
    door.begun(0, 0.0)
    assert door.admit(2, "", 1, 0.0) is None
    assert (door.num_waiting, door.num_requests) == (2, 3)


def test_the_queue_is_bounded_in_tokens() -> None:
    door = admission(tokens=25)
    fill(door, 2)
    refusal = door.admit(2, "", 6, 0.0)
    assert refusal is not None
    assert refusal.kind == "server"
    assert refusal.message.startswith(
        "20 tokens wait and this request adds 6, max_waiting_tokens is 25; "
    )
    assert door.admit(2, "", 5, 0.0) is None


def test_a_tenant_has_a_share_of_what_waits_and_runs() -> None:
    door = admission(tenant=2)
    assert door.admit(0, "a", 1, 0.0) is None
    assert door.admit(1, "a", 1, 0.0) is None
    door.begun(0, 0.0)
    refusal = door.admit(2, "a", 1, 0.0)
    assert refusal is not None
    assert refusal.kind == "tenant"
    assert "max_requests_per_tenant is 2" in refusal.message
    assert door.admit(2, "b", 1, 0.0) is None
    door.release(0, 1.0)
    assert door.admit(3, "a", 1, 1.0) is None


def test_a_request_larger_than_the_limit_is_admitted_when_nothing_waits() -> None:
    door = admission(tokens=10)
    assert door.admit(0, "", 1000, 0.0) is None
    assert door.admit(1, "", 1, 0.0) is not None
    door.begun(0, 0.0)
    assert door.admit(1, "", 1, 0.0) is None
    assert door.admit(2, "", 1000, 0.0) is not None


def test_the_true_count_replaces_the_estimate() -> None:
    door = admission(tokens=100)
    fill(door, 2, tokens=50)
    assert door.admit(2, "", 1, 0.0) is not None
    door.settle(0, 20)
    assert door.num_waiting_tokens == 70
    assert door.admit(2, "", 30, 0.0) is None
    door.settle(1, 500)
    assert door.num_waiting_tokens == 550, "known to be more, and kept"
    assert door.admit(3, "", 0, 0.0) is not None
    door.begun(1, 0.0)
    assert door.admit(3, "", 50, 0.0) is None
    door.settle(1, 5)
    assert door.num_waiting_tokens == 100, "what runs waits no more"


def test_what_has_ended_is_ended_once() -> None:
    door = admission()
    fill(door, 2)
    door.begun(0, 0.0)
    door.begun(0, 0.0)
    for _ in range(2):
        for request_id in (0, 1, 7):
            door.release(request_id, 0.0)
    door.begun(1, 0.0)
    door.settle(1, 100)
    assert (door.num_requests, door.num_waiting, door.num_waiting_tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    "name", ["max_waiting_requests", "max_waiting_tokens", "max_requests_per_tenant"]
)
def test_a_limit_that_lets_nothing_in_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        AdmissionLimits(**{name: 0})


# --- how long the queue may be in time


def seated(num_seats: int, delay_s: float) -> Admission:
    """A door with every seat taken, at time 0, and more than that have come."""
    door = Admission(AdmissionLimits(max_queue_delay_s=delay_s), num_seats)
    fill(door, num_seats + MIN_QUEUE)
    for request_id in range(num_seats):
        door.begun(request_id, 0.0)
    door.admit(99, "", 10, 0.0)
    door.release(99, 0.0)
    for request_id in range(num_seats, num_seats + MIN_QUEUE):
        door.release(request_id, 0.0)  # given up
    return door


def test_without_a_queue_whoever_finds_no_seat_is_refused() -> None:
    door = seated(4, 0.0)
    refusal = door.admit(100, "", 10, 0.0)
    assert refusal is not None
    assert (refusal.kind, refusal.for_all) == ("server", True)
    assert refusal.message.startswith(
        "4 sequences are there, 4 can run at once, and one more would wait longer than "
        "max_queue_delay 0 s; "
    )
    door.release(0, 0.1)
    assert door.admit(100, "", 10, 0.1) is None
    assert door.admit(101, "", 10, 0.1) is not None


@pytest.mark.parametrize("num_seats", [4, 2 * MIN_QUEUE])
def test_clients_that_take_turns_may_be_twice_as_many_as_the_seats(num_seats: int) -> None:
    door = Admission(AdmissionLimits(max_queue_delay_s=0.0), num_seats)
    num_clients = num_seats + max(num_seats, MIN_QUEUE)
    fill(door, num_clients)
    now_s = 0.0
    for oldest in range(1000):
        now_s += 0.1
        door.begun(oldest, now_s)
        door.release(oldest, now_s)
        assert door.admit(num_clients + oldest, "", 10, now_s) is None


def test_once_too_many_came_nobody_queues_until_none_was_refused_for_a_while() -> None:
    door = Admission(AdmissionLimits(max_queue_delay_s=0.0), 4)
    fill(door, 4 + MIN_QUEUE)
    assert door.admit(100, "", 10, 0.0) is not None
    for request_id in range(MIN_QUEUE):
        door.release(request_id, 0.0)
    assert door.admit(100, "", 10, 0.0) is not None, "one would wait"
    door.release(MIN_QUEUE, 0.0)
    assert door.admit(100, "", 10, 0.4) is None, "there is a seat"
    assert door.admit(101, "", 10, 0.4) is not None
    assert door.admit(101, "", 10, 0.8) is not None, "since the last refusal, not the first"
    for request_id in range(101, 101 + MIN_QUEUE):
        assert door.admit(request_id, "", 10, 1.4) is None
    assert door.admit(300, "", 10, 1.4) is not None


@pytest.mark.parametrize(("delay_s", "num_queued"), [(0.0, 0), (0.25, 2), (1.05, 10)])
def test_the_queue_is_as_long_as_it_may_take(delay_s: float, num_queued: int) -> None:
    """Ten end a second, whatever their number."""
    door = seated(4, delay_s)
    there, next_id, now_s = [0, 1, 2, 3], 1000, 0.0
    for _ in range(2000):
        now_s += 0.1
        ended = there.pop(0)
        door.begun(ended, now_s)
        door.release(ended, now_s)
        while door.admit(next_id, "", 10, now_s) is None:
            there.append(next_id)
            next_id += 1
        next_id += 1
    assert len(there) == 4 + num_queued


def test_before_anything_has_ended_the_queue_is_open_no_longer_than_that() -> None:
    door = seated(4, 0.5)
    for request_id in range(100, 200):
        assert door.admit(request_id, "", 10, 0.2) is None
    assert door.admit(300, "", 10, 0.6) is not None


def test_what_belongs_with_one_that_was_admitted_is_admitted() -> None:
    door = seated(4, 0.0)
    assert door.admit(100, "", 10, 0.0, is_further=True) is None
    assert door.admit(101, "", 10, 0.0) is not None
    door.release(0, 0.0)
    assert door.admit(101, "", 10, 0.0) is not None, "it holds the seat that came free"


def test_every_sequence_of_a_request_takes_a_seat() -> None:
    door = seated(8, 0.0)
    for request_id in range(3):
        door.release(request_id, 0.0)
    assert door.admit(100, "", 10, 0.0) is None
    door.settle(100, 10, num_sequences=3)
    refusal = door.admit(101, "", 10, 0.0)
    assert refusal is not None and refusal.message.startswith("8 sequences are there, 8 can")
    door.release(100, 0.0)
    assert [door.admit(200 + i, "", 10, 0.0) is None for i in range(4)] == [True] * 3 + [False]


@pytest.mark.parametrize(("seats", "delay_s"), [(None, 0.0), (4, None)])
def test_where_seats_or_the_limit_are_not_known_nobody_is_refused_for_time(
    seats: int | None, delay_s: float | None
) -> None:
    door = Admission(AdmissionLimits(max_queue_delay_s=delay_s), seats)
    fill(door, 1000)


@pytest.mark.parametrize("delay_s", [-0.1, float("nan")])
def test_a_delay_that_cannot_be_is_refused(delay_s: float) -> None:
    with pytest.raises(InputError, match="max_queue_delay must be 0 s or more"):
        AdmissionLimits(max_queue_delay_s=delay_s)


# --- when to come again


def steady(door: Admission, per_s: float, seconds: float, tokens: int = 10) -> float:
    """Keep the queue full while requests finish at a steady rate; gives the time."""
    now_s, request_id = 0.0, 0
    running: list[int] = []
    waiting: list[int] = []
    while now_s < seconds:
        while door.admit(request_id, "t", tokens, now_s) is None:
            waiting.append(request_id)
            request_id += 1
        if len(running) == 4:
            door.release(running.pop(0), now_s)
        running.append(waiting.pop(0))
        door.begun(running[-1], now_s)
        now_s += 1 / per_s
    while door.admit(request_id, "t", tokens, now_s) is None:
        request_id += 1
    return now_s


@pytest.mark.parametrize("per_s", [0.1, 0.2, 0.5, 4.0])
def test_retry_follows_the_rate_seen(per_s: float) -> None:
    door = admission(requests=3)
    now_s = steady(door, per_s, 200 / per_s)
    refusal = door.admit(-1, "t", 10, now_s)
    assert refusal is not None
    expected = min(max(1 / per_s, MIN_RETRY_S), MAX_RETRY_S)
    assert refusal.retry_after_s == pytest.approx(expected, rel=0.4)
    assert refusal.message.endswith(f"try again in about {refusal.retry_after_s:.0f} s")


def test_more_tokens_over_the_limit_take_longer() -> None:
    door = admission(requests=1000, tokens=300)
    now_s = steady(door, 1.0, 200.0)
    waits = []
    for tokens in (10, 50, 200, 100_000):
        refusal = door.admit(-1, "t", tokens, now_s)
        assert refusal is not None
        waits.append(refusal.retry_after_s)
    assert waits == pytest.approx([1, 5, 20, 30], rel=0.1), "room for any once nothing waits"


def test_where_nothing_is_known_it_says_so_and_waits_as_long_again() -> None:
    door = admission(requests=1)
    fill(door, 1)
    for now_s, expected in [(0.0, 1.0), (5.0, 5.0), (10_000.0, 30.0)]:
        refusal = door.admit(9, "", 1, now_s)
        assert refusal is not None
        assert refusal.retry_after_s == pytest.approx(expected, rel=0.1)
        assert "not known" in refusal.message


def test_a_standstill_lengthens_the_wait() -> None:
    door = admission(requests=3)
    now_s = steady(door, 2.0, 60.0)
    waits = []
    for stuck_s in (0.0, 15.0, 60.0, 400.0):
        refusal = door.admit(-1, "t", 10, now_s + stuck_s)
        assert refusal is not None
        waits.append(refusal.retry_after_s)
    assert waits == sorted(waits)
    assert waits[0] == MIN_RETRY_S
    assert waits[-1] == MAX_RETRY_S


def test_idle_time_neither_teaches_nor_unteaches() -> None:
    door = admission(requests=1)
    now_s = steady(door, 0.5, 100.0)
    before = door.admit(-1, "t", 10, now_s)
    for request_id in range(200):
        door.release(request_id, now_s)
    assert door.num_requests == 0
    later_s = now_s + 50_000.0
    assert door.admit(1000, "t", 10, later_s) is None
    after = door.admit(-1, "t", 10, later_s)
    assert before is not None
    assert after is not None
    assert after.retry_after_s == pytest.approx(before.retry_after_s, rel=0.2)


def test_what_is_given_up_while_it_waits_tells_nothing() -> None:
    door = admission(requests=2)
    fill(door, 2)
    door.release(0, 5.0)
    assert door.admit(2, "", 10, 5.0) is None
    refusal = door.admit(3, "", 10, 5.0)
    assert refusal is not None
    assert "not known" in refusal.message


def test_a_tenant_waits_for_its_share_of_what_ends() -> None:
    door = admission(requests=1000, tenant=2)
    now_s = 0.0
    for request_id in range(100):
        assert door.admit(request_id, "other", 10, now_s) is None
        door.begun(request_id, now_s)
        now_s += 1.0
        door.release(request_id, now_s)
    now_s += 1000.0  # with nothing there
    for request_id, tenant in enumerate(["a", "a", "b", "b"], 100):
        assert door.admit(request_id, tenant, 10, now_s) is None
        door.begun(request_id, now_s)
    refusal = door.admit(200, "a", 10, now_s)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(2.0, rel=0.1)


def test_a_drain_counts_requests_or_tokens_whichever_take_longer() -> None:
    drain = DrainRate()
    assert drain.seconds_for(1, 1) is None
    for _ in range(1000):
        drain.elapse(0.5)
        drain.finish(20)
    assert drain.seconds_for(10, 0) == pytest.approx(5.0, rel=0.05)
    assert drain.seconds_for(10, 4000) == pytest.approx(100.0, rel=0.05)
    assert drain.seconds_for(0, 0) == 0.0


# --- random histories against a model that counts anew each time


@given(
    st.integers(1, 4),
    st.none() | st.integers(1, 60),
    st.none() | st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_counts_hold_whatever_happens(
    requests: int, tokens: int | None, tenant: int | None, seed: int
) -> None:
    chance = random.Random(seed)
    door = admission(requests, tokens, tenant)
    there: dict[int, tuple[str, int, bool]] = {}  # tenant, tokens, waiting
    now_s = 0.0
    for request_id in range(80):
        now_s += chance.choice([0.0, 0.01, 3.0])
        known = chance.randint(0, request_id)
        who, size = chance.choice("abc"), chance.choice([0, 1, 10, 30, 90])
        match chance.choice(["admit", "admit", "begun", "release", "settle"]):
            case "admit":
                waiting = [count for _, count, is_waiting in there.values() if is_waiting]
                refusal = door.admit(request_id, who, size, now_s)
                over_tenant = (
                    tenant is not None and [w for w, *_ in there.values()].count(who) >= tenant
                )
                over_server = bool(waiting) and (
                    len(waiting) >= requests
                    or (tokens is not None and sum(waiting) + size > tokens)
                )
                if refusal is None:
                    assert not over_tenant
                    assert not over_server
                    there[request_id] = (who, size, True)
                else:
                    assert over_tenant if refusal.kind == "tenant" else over_server
                    assert MIN_RETRY_S <= refusal.retry_after_s <= MAX_RETRY_S
                    assert "\n" not in refusal.message
            case "begun":
                door.begun(known, now_s)
                if known in there:
                    there[known] = (*there[known][:2], False)
            case "release":
                door.release(known, now_s)
                there.pop(known, None)
            case "settle":
                door.settle(known, size)
                if known in there:
                    there[known] = (there[known][0], size, there[known][2])
        waiting = [count for _, count, is_waiting in there.values() if is_waiting]
        assert door.num_requests == len(there)
        assert door.num_waiting == len(waiting) <= requests
        assert door.num_waiting_tokens == sum(waiting)
    for request_id in list(there):
        door.release(request_id, now_s)
    assert (door.num_requests, door.num_waiting, door.num_waiting_tokens) == (0, 0, 0)
    assert not door._per_tenant
