"""What a scheduler counts."""

from __future__ import annotations

import msgspec
from tests.pure.scheduling import EOS, add, add_prompt, answer, make_scheduler, plan, run

from spanwise.scheduler.stats import SchedulerStats


def test_counts_of_a_short_life() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    add_prompt(scheduler, 1, range(10), max_tokens=2, stop_token_ids=())
    add_prompt(scheduler, 2, range(10), stop_token_ids=(EOS,))
    add(scheduler, 3, 5, deadline_s=1.0)
    add(scheduler, 4, 5)
    made = [plan(scheduler), plan(scheduler)]
    stats = scheduler.stats
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (2, 2, 10)
    assert (stats.used_blocks, stats.total_blocks) == ((4,), (100,))
    scheduler.expire(2.0)
    scheduler.abort(4)
    answer(scheduler, made[0])
    answer(scheduler, made[1], EOS)
    assert scheduler.stats == SchedulerStats(
        num_running=0,
        num_waiting=0,
        num_waiting_tokens=0,
        used_blocks=(0,),
        total_blocks=(100,),
        num_steps=2,
        num_preemptions=0,
        num_admitted=2,
        finished={"deadline": 1, "abort": 1, "stop": 1, "length": 1},
        prefix_queried_tokens=20,
        prefix_hit_tokens=8,
        planned_prefill_tokens=12,
        planned_decode_tokens=2,
    )
    assert scheduler.stats.num_expired == 1


def test_stops_from_outside_are_stops() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3)
    plan(scheduler)
    scheduler.stop(1)
    scheduler.stop(1)
    assert scheduler.stats.finished == {"stop": 1}


def test_coming_back_is_no_admission_but_a_lookup() -> None:
    scheduler = make_scheduler(num_blocks=4, max_in_flight=1)
    for sequence_id in (1, 2):
        add(scheduler, sequence_id, 7, max_tokens=4)
    made = run(scheduler)
    stats = scheduler.stats
    assert (stats.num_admitted, stats.num_preemptions) == (2, 1)
    assert stats.prefix_queried_tokens == 7 + 7 + 9
    assert stats.num_steps == len(made)
    total = sum(row.count for m in made for row in m.lanes[0].rows)
    assert stats.planned_prefill_tokens + stats.planned_decode_tokens == total


def test_stats_are_a_record_of_that_moment() -> None:
    scheduler = make_scheduler()
    before = scheduler.stats
    add(scheduler, 1, 3, max_tokens=1)
    run(scheduler)
    assert before.finished == {}
    assert msgspec.json.decode(msgspec.json.encode(scheduler.stats))["finished"] == {"length": 1}
