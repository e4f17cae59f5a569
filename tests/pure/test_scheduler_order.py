"""Who is admitted when: priorities, tenants, and what a router may take back."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.pure.scheduling import EOS, add, answer, begun, make_scheduler, plan, rows, run

from spanwise.scheduler.scheduler import Scheduler


def order(scheduler: Scheduler) -> list[int]:
    """Who begins when all run one step at a time to the end."""
    return [sequence_id for made in run(scheduler) for sequence_id in begun(made)]


# Priorities.


def test_the_more_urgent_is_admitted_first_and_equals_by_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for sequence_id, priority in ((1, 5), (2, 0), (3, 5), (4, -1), (5, 0)):
        add(scheduler, sequence_id, 3, max_tokens=2, priority=priority)
    assert order(scheduler) == [4, 2, 5, 1, 3]


def test_the_least_urgent_gives_way_then_the_youngest() -> None:
    scheduler = make_scheduler(num_blocks=6, max_in_flight=1)
    add(scheduler, 1, 7, max_tokens=3, priority=1)
    add(scheduler, 2, 7, max_tokens=9)
    add(scheduler, 3, 7, max_tokens=9)
    made = []
    for _ in range(3):
        made.append(plan(scheduler))
        answer(scheduler, made[-1])
    assert [row[0] for row in rows(made[0])] == [2, 3, 1]
    assert made[2].lanes[0].dropped == (1,), "the oldest, but the least urgent"
    assert [row[0] for row in rows(made[2])] == [2, 3]
    for _ in range(4):
        made.append(plan(scheduler))
        answer(scheduler, made[-1])
    assert made[6].lanes[0].dropped == (3,), "of equals the youngest"


def test_a_less_urgent_one_never_takes_blocks_from_a_more_urgent_one() -> None:
    scheduler = make_scheduler(num_blocks=4, max_in_flight=1)
    add(scheduler, 1, 7, max_tokens=6, priority=1)
    answer(scheduler, plan(scheduler))
    add(scheduler, 2, 7, max_tokens=6)
    answer(scheduler, plan(scheduler))
    made = plan(scheduler)
    assert rows(made) == [(2, 7, 1, 8, True)], "1 wants a block, and waits for one"
    assert made.lanes[0].dropped == ()
    answer(scheduler, made)
    made = plan(scheduler)
    assert rows(made) == [(2, 8, 1, 9, True)]
    assert made.lanes[0].dropped == (1,)


def test_chunks_of_the_more_urgent_go_first() -> None:
    scheduler = make_scheduler(max_step_tokens=8, max_in_flight=9)
    add(scheduler, 1, 20, priority=1, max_tokens=1)
    plan(scheduler)
    plan(scheduler)
    add(scheduler, 2, 11, max_tokens=1)
    assert rows(plan(scheduler)) == [(1, 16, 4, 20, True), (2, 0, 4, 11, False)]
    add(scheduler, 3, 9, max_tokens=1, priority=-1)
    assert rows(plan(scheduler)) == [(2, 4, 7, 11, True), (3, 0, 1, 9, False)]
    assert rows(plan(scheduler)) == [(3, 1, 8, 9, True)]


def test_a_preempted_one_comes_back_before_its_equals_begin_but_after_more_urgent_ones() -> None:
    scheduler = make_scheduler(num_blocks=4, max_in_flight=1)
    add(scheduler, 1, 7, max_tokens=6)
    add(scheduler, 2, 7, max_tokens=6)
    add(scheduler, 3, 3, max_tokens=1)
    made = []
    while not made or made[-1].lanes[0].dropped != (2,):
        made.append(plan(scheduler))
        answer(scheduler, made[-1])
    add(scheduler, 4, 3, max_tokens=1, priority=-1)
    made += run(scheduler)
    assert [i for m in made for i in begun(m)] == [1, 2, 4, 2, 3]


def test_an_urgent_flood_does_not_touch_the_order_of_the_rest() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for sequence_id in (1, 2, 3):
        add(scheduler, sequence_id, 3, max_tokens=1, priority=1)
    for sequence_id in range(10, 15):
        add(scheduler, sequence_id, 3, max_tokens=1)
    assert order(scheduler) == [10, 11, 12, 13, 14, 1, 2, 3]


# Tenants.


def test_a_late_tenant_does_not_wait_behind_anothers_backlog() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for sequence_id in range(10):
        add(scheduler, sequence_id, 4, max_tokens=2, tenant="bulk")
    for _ in range(3):
        answer(scheduler, plan(scheduler), EOS)
    for sequence_id in (50, 51):
        add(scheduler, sequence_id, 4, max_tokens=2, tenant="late")
    # Lifted to the backlogged tenant's counter, the late one takes turns with it.
    assert order(scheduler) == [3, 50, 4, 51, 5, 6, 7, 8, 9]


def test_service_is_shared_by_tokens_not_by_requests() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for index in range(4):
        add(scheduler, index, 15, max_tokens=1, tenant="long")
    for index in range(10, 26):
        add(scheduler, index, 3, max_tokens=1, tenant="short")
    first = order(scheduler)[:10]
    assert Counter(i < 10 for i in first) == {True: 2, False: 8}, "16 tokens each against 4"


def test_generated_tokens_count_as_service() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for index in range(3):
        add(scheduler, index, 4, max_tokens=20, tenant="talks")
    for index in range(10, 18):
        add(scheduler, index, 4, max_tokens=1, tenant="scores")
    assert order(scheduler)[:6] == [0, 10, 11, 12, 13, 14]


def test_what_is_found_in_the_cache_costs_nothing() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for index in range(3):
        prompt = tuple(range(20))
        add(scheduler, index, 0, prompt_token_ids=prompt, max_tokens=1, tenant="again")
    for index in range(10, 13):
        add(scheduler, index, 8, max_tokens=1, tenant="new")
    # 21 tokens, then 5 each, against 9 each.
    assert order(scheduler) == [0, 10, 11, 12, 1, 2]


def test_idleness_earns_no_credit() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for index in range(8):
        add(scheduler, index, 4, max_tokens=1, tenant="busy")
    for _ in range(4):
        answer(scheduler, plan(scheduler))
    for index in range(10, 14):
        add(scheduler, index, 4, max_tokens=1, tenant="idle")
    assert order(scheduler) == [4, 10, 5, 11, 6, 12, 7, 13], "not 10 to 13 at once"
    for index in range(20, 23):
        add(scheduler, index, 4, max_tokens=1, tenant="third")
        add(scheduler, index + 10, 4, max_tokens=1, tenant="busy")
    assert order(scheduler) == [20, 30, 21, 31, 22, 32], "nor against who has just gone"


def test_tenants_stand_within_a_priority() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, 1, 3, max_tokens=1, tenant="a", priority=1)
    add(scheduler, 2, 3, max_tokens=1, tenant="b")
    add(scheduler, 3, 3, max_tokens=1, tenant="b")
    assert order(scheduler) == [2, 3, 1]


@pytest.mark.parametrize("num_seqs", [1, 4])
def test_backlogged_tenants_stay_close(num_seqs: int) -> None:
    """Sheng et al.: apart by no more than twice what one admission and the running ones take."""
    scheduler = make_scheduler(max_num_seqs=num_seqs, max_in_flight=1)
    shapes = {"a": (30, 2), "b": (2, 30), "c": (9, 9)}
    tenant_of = {}
    for number, (tenant, (num_prompt, num_output)) in enumerate(shapes.items()):
        for index in range(100 * number, 100 * number + 60):
            add(scheduler, index, num_prompt, max_tokens=num_output, tenant=tenant)
            tenant_of[index] = tenant
    served: Counter[str] = Counter()
    for _ in range(300):
        made = plan(scheduler)
        for new in made.lanes[0].new:
            served[tenant_of[new.sequence_id]] += len(new.token_ids)
        for update in answer(scheduler, made):
            served[tenant_of[update.sequence_id]] += len(update.token_ids)
        assert max(served.values()) - min(served[tenant] for tenant in shapes) <= 2 * (
            32 + 32 * num_seqs
        )
    assert min(served.values()) > 150


# What a router asks.


def test_withdrawn_is_what_would_have_come_last() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, 1, 3, max_tokens=3)
    plan(scheduler)
    for sequence_id, num_prompt, tenant, priority in (
        (2, 9, "a", 0),
        (3, 3, "b", 0),
        (4, 3, "b", 0),
        (5, 3, "a", 0),
        (6, 3, "a", 1),
        (7, 3, "b", -1),
    ):
        add(scheduler, sequence_id, num_prompt, max_tokens=1, tenant=tenant, priority=priority)
    assert scheduler.num_waiting_tokens == 24
    # Tenant b has had 3 more than a when 7 is through, and 3 less when 2 and 3 are.
    assert scheduler.withdrawable() == [6, 5, 4, 3, 2, 7]
    request = scheduler.withdraw(5)
    assert request is not None and request.sequence_id == 5
    assert scheduler.withdrawable() == [6, 4, 3, 2, 7]
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (5, 21)
    assert scheduler.withdraw(5) is None
    assert scheduler.withdraw(1) is None, "it runs"


def test_the_order_of_withdrawal_is_the_order_of_admission_reversed() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for index in range(12):
        add(
            scheduler,
            index,
            3 + index % 5,
            max_tokens=1,
            tenant="abc"[index % 3],
            priority=index % 2,
        )
    expected = scheduler.withdrawable()[::-1]
    made: list[int] = []
    while scheduler.num_waiting:
        step = plan(scheduler)
        made += begun(step)
        scheduler.abort(begun(step)[0])  # nothing is generated
        answer(scheduler, step)
    assert made == expected


def test_a_sequence_that_began_once_is_never_handed_back() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3)
    plan(scheduler)
    scheduler.restart(1)
    assert scheduler.withdrawable() == []
    assert scheduler.withdraw(1) is None
    assert begun(plan(scheduler)) == [1]


def test_a_place_is_a_seat_and_a_block() -> None:
    scheduler = make_scheduler(max_num_seqs=2, num_blocks=3)
    assert scheduler.can_start
    add(scheduler, 1, 5, max_tokens=2)
    assert scheduler.can_start, "it only waits"
    plan(scheduler)
    assert scheduler.can_start
    add(scheduler, 2, 1, max_tokens=2)
    plan(scheduler)
    assert not scheduler.can_start, "no seat"
    scheduler.abort(2)
    assert scheduler.can_start
    scheduler = make_scheduler(num_blocks=2)
    add(scheduler, 1, 5, max_tokens=2)
    plan(scheduler)
    assert not scheduler.can_start, "no block"
