"""Pipelines that are full: chunks and micro-batches on stages that take time."""

from __future__ import annotations

import os
import random
from collections import deque

import pytest
from tests.pure.pipeline import Pipeline, StepCost, Wanted, pipeline_config, speedup
from tests.pure.scheduling import add, answer, make_scheduler, plan, rows

from spanwise.engine.core import EngineCore
from spanwise.engine.launch import ReplicaHandle
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.scheduler.step_times import StepTimes, rounded_down
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import LaneResult, Sampled, StepPlan, StepResult

# Whole models: 500M parameters on a core, the same on a card (launches are most of a step).
CORE = StepCost(step_s=26e-3, prompt_token_s=2e-3, decode_row_s=1e-3)
CARD = StepCost(step_s=10e-3, prompt_token_s=5e-5, decode_row_s=5e-5)
HALVES, QUARTERS = (0.5, 0.5), (0.25,) * 4


@pytest.mark.parametrize("warm", [False, True])
def test_two_stages_are_worth_nearly_two_devices(warm: bool) -> None:
    assert speedup(CORE, HALVES, Wanted(48, 256, 8), warm) > 1.82
    assert speedup(CORE, HALVES, Wanted(48, 64, 64), warm) > 1.55


@pytest.mark.parametrize(
    ("model", "shares", "wanted", "least"),
    [
        (CORE, HALVES, Wanted(1, 1024, 16), 1.47),
        (CORE, HALVES, Wanted(4, 512, 32), 1.54),
        (CORE, HALVES, Wanted(16, 2000, 100), 1.84),
        (CORE, (0.43, 0.57), Wanted(48, 64, 64), 1.41),
        (CORE, QUARTERS, Wanted(48, 256, 8), 3.40),
        (CORE, QUARTERS, Wanted(48, 64, 64), 2.45),
        (CORE, QUARTERS, Wanted(1, 1024, 16), 2.05),
        (CARD, HALVES, Wanted(48, 256, 8), 1.77),
        (CARD, HALVES, Wanted(16, 2000, 100), 1.48),
        (CARD, QUARTERS, Wanted(48, 256, 8), 2.75),
    ],
)
def test_chunks_suit_what_steps_take(
    model: StepCost, shares: tuple[float, ...], wanted: Wanted, least: float
) -> None:
    """Each limit lies closely below what is reached; without measured times half are missed."""
    assert speedup(model, shares, wanted) > least


def test_the_same_times_give_the_same_plans() -> None:
    first, second = Pipeline([CORE, CORE]), Pipeline([CORE, CORE])
    for wanted in (Wanted(9, 300, 20), Wanted(3, 700, 5)):
        assert first.run(wanted) == second.run(wanted)


# What is learnt of a stage.


def measure(times: StepTimes, cost: StepCost, num_decoding: int = 12, noise: float = 0.0) -> None:
    """Steps of 300 tokens of prompts, and steps of decodes."""
    chance = random.Random(3)
    for _ in range(60):
        for num_tokens, each_s in ((num_decoding, cost.decode_row_s), (300, cost.prompt_token_s)):
            taken_s = (cost.step_s + each_s * num_tokens) * chance.uniform(1 - noise, 1 + noise)
            times.add(min(num_tokens, num_decoding), num_tokens, taken_s)


def measured(cost: StepCost, num_decoding: int = 12) -> StepTimes:
    times = StepTimes(2, 256, 512)
    measure(times, cost, num_decoding)
    return times


@pytest.mark.parametrize(
    ("step_s", "chunk"), [(0.0, 16), (3e-3, 32), (13e-3, 128), (26e-3, 256), (1.0, 512)]
)
def test_a_chunk_takes_about_ten_times_a_step_by_itself(step_s: float, chunk: int) -> None:
    cost = StepCost(step_s, prompt_token_s=1e-3, decode_row_s=1e-3)
    assert measured(cost, num_decoding=1).chunk(1) == chunk


@pytest.mark.parametrize("decode_row_s", [0.2e-3, 1e-3, 2e-3])
def test_what_decoding_rows_take_is_not_taken_for_a_steps_own(decode_row_s: float) -> None:
    cost = StepCost(step_s=13e-3, prompt_token_s=1e-3, decode_row_s=decode_row_s)
    assert 64 <= measured(cost, num_decoding=12).chunk(1) <= 256


def test_much_to_do_makes_larger_chunks_whatever_a_step_takes() -> None:
    assert measured(CORE.share(0.5)).chunk(16 * 500) == 500
    assert StepTimes(3, 64, 512).chunk(6 * 100) == 100, "not measured yet: two chunks a stage"
    assert StepTimes(3, 64, 512).chunk(1) == 64


@pytest.mark.parametrize(
    ("given", "kept"), [(1, 1), (15, 15), (17, 16), (100, 96), (300, 288), (527, 512), (1600, 1536)]
)
def test_a_step_is_rounded_to_what_devices_compute_anyway(given: int, kept: int) -> None:
    assert rounded_down(given) == kept
    assert all(count - rounded_down(count) < max(16, count / 8) for count in range(1, 3000))


def test_decoding_rows_and_chunks_make_round_steps_together() -> None:
    scheduler = Scheduler(pipeline_config(2))
    for sequence_id in range(12):
        add(scheduler, sequence_id, 300, max_tokens=30, stop_token_ids=())
    made = deque([plan(scheduler)])
    mixed = 0
    while made:
        while (following := scheduler.next_plan()) is not None:
            made.append(following)
        oldest = made.popleft()
        counts = [row[2] for row in rows(oldest)]
        is_mixed = 1 in counts and max(counts) > 1 and scheduler.num_waiting > 0
        assert not is_mixed or sum(counts) % 16 == 0, counts
        mixed += is_mixed
        answer(scheduler, oldest)
    assert mixed


def test_times_that_vary_a_little_change_nothing() -> None:
    times = measured(CORE.share(0.5))
    chunk = times.chunk(1)
    for _ in range(10):
        measure(times, CORE.share(0.5), noise=0.3)
        assert times.chunk(1) == chunk
    measure(times, CARD.share(0.5))
    assert times.chunk(1) == 512, "another pace is learnt"


def test_nothing_is_learnt_from_a_few_steps_or_from_one_kind() -> None:
    times = StepTimes(2, 100, 512)
    for _ in range(50):
        times.add(8, 8, 1.0)
    times.add(1, 300, 1e-3)
    assert times.chunk(1) == 100


def test_results_that_come_together_do_no_harm() -> None:
    times = StepTimes(2, 100, 512)
    for _ in range(10):
        times.add(8, 8, 0.0)
        times.add(1, 300, 0.0)
    assert times.chunk(1) == 512
    for _ in range(200):
        times.add(8, 8, 21e-3)
        times.add(1, 300, 313e-3)
    assert times.chunk(1) == 128


def timed(scheduler: Scheduler, gaps_s: list[float]) -> None:
    """One result after another, so many seconds apart."""
    now_s, made = 0.0, deque([plan(scheduler)])
    for gap_s in gaps_s:
        while (following := scheduler.next_plan()) is not None:
            made.append(following)
        now_s += gap_s
        oldest = made.popleft()
        drawn = tuple(Sampled(r[0], 7 if r[4] else -1) for r in rows(oldest))
        scheduler.accept(StepResult(oldest.epoch, oldest.step, (LaneResult(drawn),)), now_s)
    while made:
        answer(scheduler, made.popleft())


def test_idle_time_is_not_taken_for_a_steps() -> None:
    """A result is only timed where another came before while the step was in flight."""
    scheduler = Scheduler(pipeline_config(2))
    for sequence_id in range(40):
        add(scheduler, sequence_id, 300, max_tokens=1, stop_token_ids=())
        timed(scheduler, [1000.0, 0.1])
        assert scheduler.num_running == 0
    assert scheduler._times._prefills.taken_s == pytest.approx(0.1)


def test_a_lone_sequence_shows_the_whole_way() -> None:
    scheduler = Scheduler(pipeline_config(4))
    add(scheduler, 1, 20, max_tokens=400, stop_token_ids=())
    timed(scheduler, [0.4] * 100)
    assert scheduler._times._decodes.taken_s == pytest.approx(0.1)


def test_a_restart_is_no_step() -> None:
    scheduler = Scheduler(pipeline_config(2))
    add(scheduler, 1, 20, max_tokens=100)
    timed(scheduler, [1.0] * 5)
    before = scheduler._times._decodes.taken_s
    scheduler.restart(1)
    timed(scheduler, [500.0])
    assert scheduler._times._decodes.taken_s == before


def test_one_stage_takes_all_it_may() -> None:
    scheduler = make_scheduler(num_blocks=400, max_step_tokens=200, max_model_len=700)
    add(scheduler, 1, 600, max_tokens=30)
    timed(scheduler, [0.1] * 30)
    add(scheduler, 2, 600, max_tokens=1)
    assert sum(row[2] for row in rows(plan(scheduler))) == 200


class TimedScheduler(Scheduler):
    """Remembers when it was told that results came."""

    def accept(self, result: StepResult, now_s: float | None = None) -> list[SequenceUpdate]:
        assert now_s is not None, "the engine tells no time"
        return super().accept(result, now_s)


class InstantExecutor:
    """Answers every plan when asked, with token 7."""

    def __init__(self) -> None:
        self._plans: deque[StepPlan] = deque()
        self._read, self._write = os.pipe()

    def submit(self, made: StepPlan) -> None:
        self._plans.append(made)

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        made = self._plans.popleft()
        drawn = tuple(Sampled(row.sequence_id, 7) for row in made.lanes[0].rows)
        return [StepResult(made.epoch, made.step, (LaneResult(drawn),))]

    def results(self) -> list[StepResult]:
        return self.wait()

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def test_the_engine_tells_when_results_come() -> None:
    config, executor = pipeline_config(2), InstantExecutor()
    core = EngineCore([ReplicaHandle(TimedScheduler(config), executor)])
    core.add(SequenceRequest(sequence_id=1, prompt_token_ids=(1, 2, 3), max_tokens=4), 7)
    updates = core.feed(0.0)
    while core.num_in_flight:
        updates += core.wait()
    assert [token for update in updates for token in update.token_ids] == [7] * 4
    core.close()
    executor.close()
