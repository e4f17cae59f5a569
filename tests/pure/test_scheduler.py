"""The scheduler's policy by example: what exactly is planned, and when."""

import pytest
from tests.pure.scheduling import EOS, VOCAB, add, answer, make_scheduler, plan, rows, run

from spanwise.errors import InputError
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import (
    LanePlan,
    LaneResult,
    Row,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from spanwise.types.sampling import SamplingSpec


def test_idle() -> None:
    scheduler = make_scheduler()
    assert scheduler.next_plan() is None
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_in_flight) == (0, 0, 0)


def test_first_plan_introduces_and_computes_the_prompt() -> None:
    scheduler = make_scheduler()
    add(scheduler, 5, 6)
    assert scheduler.num_waiting == 1
    lane = plan(scheduler).lanes[0]
    assert [n.sequence_id for n in lane.new] == [5]
    assert lane.new[0].token_ids == (5, 2, 3, 4, 5, 6)
    assert lane.new[0].num_prompt == 6
    assert lane.rows == (Row(5, 0, 6, 6, ((0, 1),), True),)
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_in_flight) == (0, 1, 1)
    assert scheduler.num_used_blocks == (2,)


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=4, max_in_flight=9)
    add(scheduler, 1, 10)
    made = [plan(scheduler) for _ in range(3)]
    assert [rows(m) for m in made] == [
        [(1, 0, 4, 10, False)],
        [(1, 4, 4, 10, False)],
        [(1, 8, 2, 10, True)],
    ]
    assert [m.lanes[0].rows[0].new_blocks for m in made] == [((0,),), ((1,),), ((2,),)]


def test_decodes_go_before_chunks_and_chunks_before_admissions() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    add(scheduler, 1, 3)
    first = plan(scheduler)
    add(scheduler, 2, 10)
    add(scheduler, 3, 9)
    assert rows(plan(scheduler)) == [(1, 3, 1, 4, True), (2, 0, 7, 10, False)]
    answer(scheduler, first)
    assert rows(plan(scheduler)) == [(1, 4, 1, 5, True), (2, 7, 3, 10, True), (3, 0, 4, 9, False)]


def test_max_num_seqs_bounds_what_runs() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for sequence_id in range(3):
        add(scheduler, sequence_id, 2, max_tokens=2)
    first = plan(scheduler)
    assert len(first.lanes[0].rows) == 2
    assert scheduler.num_waiting == 1
    answer(scheduler, first)
    answer(scheduler, plan(scheduler))
    assert rows(plan(scheduler)) == [(2, 0, 2, 2, True)]


def test_steps_run_ahead_of_results_up_to_the_window() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3)
    first, second = plan(scheduler), plan(scheduler)
    assert rows(second) == [(1, 3, 1, 4, True)]
    assert second.lanes[0].new == ()
    assert scheduler.next_plan() is None
    assert answer(scheduler, first) == [SequenceUpdate(sequence_id=1, token_ids=(7,))]
    assert rows(plan(scheduler)) == [(1, 4, 1, 5, True)]


def test_nothing_is_planned_past_max_tokens() -> None:
    scheduler = make_scheduler(max_in_flight=9)
    add(scheduler, 1, 3, max_tokens=2)
    first, second = plan(scheduler), plan(scheduler)
    assert scheduler.next_plan() is None
    assert answer(scheduler, first)[0].finish_reason is None
    (last,) = answer(scheduler, second)
    assert (last.finish_reason, last.stop_reason) == ("length", None)
    assert (scheduler.num_running, scheduler.num_used_blocks) == (0, (0,))


def test_a_sequence_ends_at_the_models_length() -> None:
    scheduler = make_scheduler(max_model_len=6)
    add(scheduler, 1, 3, max_tokens=50)
    plans = run(scheduler)
    assert [rows(m)[0][3] for m in plans] == [3, 4, 5]


def test_a_stop_token_ends_it_and_discards_what_is_in_flight() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3)
    add(scheduler, 2, 3)
    first, second = plan(scheduler), plan(scheduler)
    updates = answer(scheduler, first, EOS)
    assert [(u.finish_reason, u.stop_reason) for u in updates] == [("stop", EOS)] * 2
    assert scheduler.num_used_blocks == (0,)
    assert answer(scheduler, second) == []
    add(scheduler, 3, 1)
    assert plan(scheduler).lanes[0].dropped == (1, 2)
    assert plan(scheduler).lanes[0].dropped == ()


def test_a_stop_token_at_the_limit_is_a_stop() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3, max_tokens=1)
    assert answer(scheduler, plan(scheduler), EOS)[0].finish_reason == "stop"


def test_tokens_that_are_no_stop_tokens_go_on() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3, stop_token_ids=())
    assert answer(scheduler, plan(scheduler), EOS)[0].finish_reason is None


@pytest.mark.parametrize("end", ["abort", "stop"])
def test_ended_from_outside_at_every_stage(end: str) -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, 1, 3)
    add(scheduler, 2, 3)
    first = plan(scheduler)
    getattr(scheduler, end)(2)
    assert scheduler.num_waiting == 0
    getattr(scheduler, end)(1)
    getattr(scheduler, end)(1)
    assert (scheduler.num_running, scheduler.num_used_blocks) == (0, (0,))
    assert answer(scheduler, first) == []
    assert scheduler.next_plan() is None
    add(scheduler, 3, 3)
    assert plan(scheduler).lanes[0].dropped == (1,), "2 was never introduced"


def test_the_youngest_gives_way_and_comes_back_when_nothing_of_it_is_in_flight() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, 1, 7, max_tokens=6)
    add(scheduler, 2, 7, max_tokens=6)
    made = [plan(scheduler), plan(scheduler)]
    answer(scheduler, made[0], 11)
    third = plan(scheduler)  # position 8 of both wants a third block, none is left
    assert rows(third) == [(1, 8, 1, 9, True)]
    assert third.lanes[0].dropped == (2,)
    assert third.lanes[0].rows[0].new_blocks == ((3,),)
    assert scheduler.num_waiting == 1
    assert [u.token_ids for u in answer(scheduler, made[1], 12)] == [(12,), (12,)]
    answer(scheduler, third)
    later = run(scheduler)
    (back,) = [new for made in later for new in made.lanes[0].new]
    assert back.token_ids == (2, 2, 3, 4, 5, 6, 7, 11, 12)
    assert back.num_prompt == 7


def test_a_token_in_flight_at_preemption_may_end_the_sequence() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, 1, 7, stop_token_ids=(), max_tokens=8)
    add(scheduler, 2, 7, max_tokens=8)
    made = [plan(scheduler), plan(scheduler)]
    answer(scheduler, made[0])
    assert plan(scheduler).lanes[0].dropped == (2,)
    updates = answer(scheduler, made[1], EOS)
    assert [u.finish_reason for u in updates] == [None, "stop"]
    assert scheduler.num_waiting == 0


def test_admission_waits_for_blocks_of_the_whole_prompt() -> None:
    scheduler = make_scheduler(num_blocks=5, max_step_tokens=4)
    add(scheduler, 1, 12, max_tokens=1)
    add(scheduler, 2, 9, max_tokens=1)
    add(scheduler, 3, 1, max_tokens=1)
    made = run(scheduler)
    assert [r[0] for m in made for r in rows(m)] == [1, 1, 1, 2, 2, 2, 3], (
        "first come, first served"
    )


def test_a_small_pool_still_runs_a_wide_window() -> None:
    # Window 8 in blocks of 4 wants 3 blocks; a chunk of the whole prompt would want 11.
    scheduler = make_scheduler(num_blocks=3, window=8, max_step_tokens=40, max_model_len=64)
    add(scheduler, 1, 40, max_tokens=10)
    made = run(scheduler)
    assert sum(r[2] for m in made for r in rows(m)) == 49
    blocks = [b for m in made for r in m.lanes[0].rows for b in r.new_blocks[0]]
    assert len(blocks) == 13 and set(blocks) == {0, 1, 2}


def test_a_length_passed_is_a_sequence_begun_anew() -> None:
    scheduler = make_scheduler(recompute_lengths=(5,))
    add(scheduler, 1, 4, max_tokens=4)
    first, second = plan(scheduler), plan(scheduler)
    assert rows(second) == [(1, 4, 1, 5, True)]
    answer(scheduler, first)
    assert scheduler.next_plan() is None, "length 6 has to wait for what is in flight"
    answer(scheduler, second, 8)
    third = plan(scheduler)
    assert third.lanes[0].dropped == (1,)
    assert third.lanes[0].new[0].token_ids == (1, 2, 3, 4, 7, 8)
    assert rows(third) == [(1, 0, 6, 6, True)]
    assert rows(plan(scheduler)) == [(1, 6, 1, 7, True)]


def test_chunks_of_a_long_prompt_have_its_length_from_the_start() -> None:
    scheduler = make_scheduler(recompute_lengths=(5,), max_step_tokens=4, max_in_flight=9)
    add(scheduler, 1, 8, max_tokens=2)
    made = [plan(scheduler), plan(scheduler), plan(scheduler)]
    assert [rows(m)[0][1:4] for m in made] == [(0, 4, 8), (4, 4, 8), (8, 1, 9)]


def test_a_sequence_begun_anew_keeps_its_age() -> None:
    scheduler = make_scheduler(num_blocks=6, max_in_flight=1, recompute_lengths=(5,))
    add(scheduler, 1, 4, max_tokens=10)
    add(scheduler, 2, 8, max_tokens=10)
    made = []
    for _ in range(6):
        made.append(plan(scheduler))
        answer(scheduler, made[-1])
    assert made[2].lanes[0].dropped == (1,)
    assert rows(made[4]) == [(1, 7, 1, 8, True), (2, 11, 1, 12, True)]
    assert rows(made[5]) == [(1, 8, 1, 9, True)], "one block for two: the older has it"


def test_admission_leaves_a_margin_to_those_that_run() -> None:
    for num_prompt, num_rows in ((197 * 4, 2), (198 * 4, 1)):
        scheduler = make_scheduler(num_blocks=200, max_step_tokens=1000, max_model_len=1000)
        add(scheduler, 1, 1, max_tokens=5)
        add(scheduler, 2, num_prompt, max_tokens=1)
        assert len(rows(plan(scheduler))) == num_rows
    scheduler = make_scheduler(num_blocks=200, max_step_tokens=1000, max_model_len=1000)
    add(scheduler, 1, 200 * 4, max_tokens=1)
    assert len(rows(plan(scheduler))) == 1, "alone it may have all"


def test_pooling_ends_with_the_last_position() -> None:
    scheduler = make_scheduler(max_step_tokens=4, max_model_len=6)
    add(scheduler, 1, 6, task="pool_last")
    first, second = plan(scheduler), plan(scheduler)
    assert scheduler.next_plan() is None
    assert first.lanes[0].new[0].task == "pool_last"
    assert rows(first) + rows(second) == [(1, 0, 4, 6, False), (1, 4, 2, 6, True)]
    assert answer(scheduler, first) == []
    pooled = LaneResult((Sampled(1, pooled=(0.5, 1.5)),))
    (update,) = scheduler.accept(StepResult(0, 1, (pooled,)))
    assert update == SequenceUpdate(sequence_id=1, pooled=(0.5, 1.5), finish_reason="stop")
    assert scheduler.num_running == 0


def test_logprobs_are_handed_on() -> None:
    scheduler = make_scheduler(max_step_tokens=2)
    add(scheduler, 1, 3, sampling=SamplingSpec(logprobs=0, prompt_logprobs=0))
    of = [TokenLogprobs(token_id, -1.0, 1) for token_id in range(5)]
    first, second = plan(scheduler), plan(scheduler)
    result = LaneResult((Sampled(1, prompt_logprobs=(of[2], of[3])),))
    (update,) = scheduler.accept(StepResult(0, first.step, (result,)))
    assert (update.token_ids, update.prompt_logprobs) == ((), (of[2], of[3]))
    result = LaneResult((Sampled(1, 4, logprobs=of[4]),))
    (update,) = scheduler.accept(StepResult(0, second.step, (result,)))
    assert (update.token_ids, update.logprobs, update.prompt_logprobs) == ((4,), (of[4],), ())


def test_a_resumed_sequence_goes_on_where_it_was() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3, output_token_ids=(8, 9), max_tokens=3)
    made = plan(scheduler)
    assert made.lanes[0].new[0].token_ids == (1, 2, 3, 8, 9)
    assert made.lanes[0].new[0].num_prompt == 3
    (update,) = answer(scheduler, made)
    assert (update.token_ids, update.finish_reason) == ((7,), "length")


def test_restart_forgets_what_is_in_flight_and_keeps_tokens_and_order() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for sequence_id in (1, 2, 3):
        add(scheduler, sequence_id, 3)
    made = [plan(scheduler), plan(scheduler)]
    answer(scheduler, made[0])
    scheduler.restart(4)
    assert (scheduler.num_running, scheduler.num_in_flight, scheduler.epoch) == (0, 0, 4)
    assert scheduler.num_used_blocks == (0,)
    assert answer(scheduler, made[1]) == []
    again = plan(scheduler)
    assert (again.epoch, again.step) == (4, 0)
    assert again.lanes[0].dropped == ()
    assert [n.token_ids for n in again.lanes[0].new] == [(1, 2, 3, 7), (2, 2, 3, 7)]
    assert rows(plan(scheduler)) == [(1, 4, 1, 5, True), (2, 4, 1, 5, True)]


def test_broken_order_is_noticed() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3)
    _, second = plan(scheduler), plan(scheduler)
    with pytest.raises(AssertionError, match="step 1 came before step 0"):
        answer(scheduler, second)
    with pytest.raises(AssertionError, match="does not follow"):
        scheduler.restart(0)
    with pytest.raises(AssertionError, match="used twice"):
        add(scheduler, 1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_token_ids": ()}, "no tokens"),
        (
            {"prompt_token_ids": (1, VOCAB)},
            "token id 100 is not in the vocabulary; use ids 0 to 99",
        ),
        ({"prompt_token_ids": (1, -1, 5)}, "token id -1"),
        ({"prompt_token_ids": (1,) * 64}, "64 tokens, but max_model_len 64 leaves room for 63"),
        ({"prompt_token_ids": (1,) * 65, "task": "pool_last"}, "leaves room for 64"),
        ({"max_tokens": 0}, "max_tokens is 0, but must be at least 1"),
        ({"max_tokens": 1, "output_token_ids": (2,)}, "must be at least 2"),
        ({"max_tokens": 12}, "may need 41 tokens of KV cache, but only 40 fit"),
        ({"max_tokens": None}, "may need 63 tokens"),
    ],
)
def test_requests_that_can_never_run(changes: dict[str, object], message: str) -> None:
    scheduler = make_scheduler(num_blocks=10)
    request = {"sequence_id": 1, "prompt_token_ids": (1,) * 30, "max_tokens": 10}
    with pytest.raises(InputError, match=message) as caught:
        scheduler.add(SequenceRequest(**(request | changes)))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert scheduler.num_waiting == 0


def test_what_just_fits_runs() -> None:
    scheduler = make_scheduler(num_blocks=10)
    add(scheduler, 1, 30, max_tokens=11)
    assert sum(r[2] for m in run(scheduler) for r in rows(m)) == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_step_tokens": 0}, "max_step_tokens must be at least 1"),
        ({"num_micro_batches": 3, "max_in_flight": 2}, "max_in_flight must be at least 3"),
        ({"num_blocks": 0}, "room for no block"),
    ],
)
def test_limits_that_leave_no_way_to_run(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_scheduler(**changes)  # type: ignore[arg-type]


def test_an_old_large_sequence_is_not_starved_by_young_small_ones() -> None:
    scheduler = make_scheduler(num_blocks=12, max_num_seqs=4, max_step_tokens=6)
    for sequence_id in range(4):
        add(scheduler, sequence_id, 3, max_tokens=5)
    add(scheduler, 1000, 40, max_tokens=8)
    finished: list[int] = []
    for sequence_id in range(100, 400):  # a small one arrives with every step
        add(scheduler, sequence_id, 3, max_tokens=5)
        finished += [u.sequence_id for u in answer(scheduler, plan(scheduler)) if u.finish_reason]
    assert finished.index(1000) == 4


# Pipelines.


def test_a_pipeline_decodes_in_micro_batches_that_take_turns() -> None:
    scheduler = make_scheduler(num_micro_batches=2, max_in_flight=4)
    for sequence_id in range(5):
        add(scheduler, sequence_id, 1)
    first = plan(scheduler)
    assert len(first.lanes[0].rows) == 5
    named = [[r[0] for r in rows(plan(scheduler))] for _ in range(3)]
    assert named == [[0, 1, 2], [3, 4], [0, 1, 2]]
    answer(scheduler, first)
    assert [r[0] for r in rows(plan(scheduler))] == [3, 4]


def test_a_lone_sequence_on_a_pipeline_runs_ahead() -> None:
    scheduler = make_scheduler(num_micro_batches=3, max_in_flight=3)
    add(scheduler, 1, 2)
    assert [rows(plan(scheduler))[0][1] for _ in range(3)] == [0, 2, 3]


def test_a_pipeline_keeps_decodes_in_flight_out_of_a_step_with_other_work() -> None:
    scheduler = make_scheduler(
        num_micro_batches=2, max_in_flight=4, min_chunk_tokens=4, max_step_tokens=4
    )
    add(scheduler, 1, 2)
    plan(scheduler)
    add(scheduler, 2, 30)
    named = [[r[0] for r in rows(plan(scheduler))] for _ in range(3)]
    assert named == [[2], [1, 2], [2]]


def busy_share(scheduler: Scheduler, num_stages: int) -> float:
    """Busy share of the stages when a row costs 1, a step 4 more, and plans and results nothing.

    A stage begins a step when it is through with the one before, the stage before it is through
    with this one, and (first stage) every input token has been drawn on the last stage.
    """
    free = [0.0] * num_stages
    busy = 0.0
    drawn: dict[int, float] = {}
    open_steps: list[tuple[float, StepPlan]] = []
    now = 0.0
    while True:
        while (made := scheduler.next_plan()) is not None:
            cost = 4.0 + sum(r.count for r in made.lanes[0].rows)
            inputs = [drawn.get(r.sequence_id, 0.0) for r in made.lanes[0].rows]
            done = max([now, *inputs])
            for stage in range(num_stages):
                done = max(done, free[stage]) + cost
                free[stage] = done
                busy += cost
            drawn |= {r.sequence_id: done for r in made.lanes[0].rows if r.sample}
            open_steps.append((done, made))
        if not open_steps:
            return busy / (num_stages * max(free))
        now, oldest = open_steps.pop(0)
        answer(scheduler, oldest)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 2])
def test_decoding_keeps_every_stage_busy(num_stages: int, window: int) -> None:
    in_flight = max(2, window * num_stages)
    scheduler = make_scheduler(
        num_blocks=200, num_micro_batches=num_stages, max_in_flight=in_flight
    )
    for sequence_id in range(8):
        add(scheduler, sequence_id, 2, max_tokens=60)
    assert busy_share(scheduler, num_stages) > 0.93


def test_prompts_alone_keep_every_stage_busy() -> None:
    scheduler = make_scheduler(
        num_blocks=1000,
        max_step_tokens=2048,
        max_model_len=2048,
        num_micro_batches=2,
        max_in_flight=4,
        min_chunk_tokens=64,
    )
    add(scheduler, 1, 2000, max_tokens=1)
    assert busy_share(scheduler, 2) > 0.8


def test_fewer_sequences_than_stages_lose_nothing_but_the_idle_stages() -> None:
    scheduler = make_scheduler(num_micro_batches=4, max_in_flight=4)
    for sequence_id in range(2):
        add(scheduler, sequence_id, 2, max_tokens=60)
    assert busy_share(scheduler, 4) > 0.48


def test_plans_are_frozen_records_with_one_lane() -> None:
    scheduler = make_scheduler()
    add(scheduler, 1, 3)
    made = plan(scheduler)
    assert len(made.lanes) == 1
    assert isinstance(made.lanes[0], LanePlan)
    assert isinstance(made.lanes[0].rows, tuple)
