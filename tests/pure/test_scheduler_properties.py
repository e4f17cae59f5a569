"""The scheduler against a rank that trusts nothing, under random load, delay, abort and restart."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spanwise.cost.blocks import peak_blocks
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.cache import CacheGroup, CacheLayout
from spanwise.types.plan import (
    LaneResult,
    NewSequence,
    Row,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from spanwise.types.sampling import SamplingSpec

VOCAB = 7
STOP = 3


def next_token(tokens: list[int]) -> int:
    """The token every layout has to draw after ``tokens``."""
    state = 17
    for token in tokens:
        state = (state * 31 + token + 7) % 1_000_003
    return state % VOCAB


@dataclass
class KnownSequence:
    """What a rank knows of a sequence."""

    new: NewSequence
    tokens: list[int]
    tables: list[list[int]]
    computed: int = 0


@dataclass(frozen=True)
class Slot:
    """What a rank wrote at one position of one block: stands for a key and a value."""

    sequence_id: int
    position: int
    token: int
    num_passed: int


class FakeRank:
    """Runs plans as a rank would, with a cache of its own, and refuses what breaks the protocol."""

    def __init__(self, config: SchedulerConfig, epoch: int) -> None:
        self.config = config
        self.epoch = epoch
        self.num_steps = 0
        self.known: dict[int, KnownSequence] = {}
        self.cache: list[dict[tuple[int, int], Slot]] = [{} for _ in config.cache.groups]

    def run(self, plan: StepPlan) -> StepResult:
        assert (plan.epoch, plan.step) == (self.epoch, self.num_steps)
        self.num_steps += 1
        (lane,) = plan.lanes
        for sequence_id in lane.dropped:
            del self.known[sequence_id]
        for new in lane.new:
            assert new.sequence_id not in self.known
            tables: list[list[int]] = [[] for _ in self.config.cache.groups]
            self.known[new.sequence_id] = KnownSequence(new, list(new.token_ids), tables)
        self._check_shape(lane.rows, {new.sequence_id for new in lane.new})
        starts = {row.sequence_id: row.start for row in lane.rows}
        for row in lane.rows:
            self._append_blocks(row, starts)
        # All rows write before any reads, as in a layer of a model.
        for row in lane.rows:
            self._write(row)
        for row in lane.rows:
            self._read(row)
        sampled = tuple(self._sample(row) for row in lane.rows)
        return StepResult(plan.epoch, plan.step, (LaneResult(sampled),))

    def _check_shape(self, rows: tuple[Row, ...], new: set[int]) -> None:
        assert 0 < sum(row.count for row in rows) <= self.config.max_step_tokens
        named = [row.sequence_id for row in rows]
        assert len(set(named)) == len(named)
        assert new <= set(named)
        assert len(self.known) <= self.config.max_num_seqs
        for row in rows:
            sequence = self.known[row.sequence_id]
            end = row.start + row.count
            assert row.count > 0
            assert row.start == sequence.computed, "a gap, or computed twice"
            assert end <= len(sequence.tokens) == row.length, "a token nobody has yet"
            assert row.sample == (end == row.length)
            assert row.length <= self.config.max_model_len

    def _append_blocks(self, row: Row, starts: dict[int, int]) -> None:
        sequence = self.known[row.sequence_id]
        size = self.config.cache.block_size
        for index, blocks in enumerate(row.new_blocks):
            group = self.config.cache.groups[index]
            for block in blocks:
                assert 0 <= block < group.num_blocks
                for other in self.known.values():
                    start = starts.get(other.new.sequence_id, other.computed)
                    first = max(0, start - group.window + 1) // size if group.window else 0
                    assert block not in other.tables[index][first:], "still read by another"
                sequence.tables[index].append(block)
            assert len(sequence.tables[index]) == -(-(row.start + row.count) // size)

    def _slots(self, row: Row, group: int, position: int) -> tuple[int, int]:
        size = self.config.cache.block_size
        return self.known[row.sequence_id].tables[group][position // size], position % size

    def _expected(self, row: Row, position: int) -> Slot:
        num_passed = sum(row.length > length for length in self.config.recompute_lengths)
        token = self.known[row.sequence_id].tokens[position]
        return Slot(row.sequence_id, position, token, num_passed)

    def _write(self, row: Row) -> None:
        for group, cache in enumerate(self.cache):
            for position in range(row.start, row.start + row.count):
                cache[self._slots(row, group, position)] = self._expected(row, position)

    def _read(self, row: Row) -> None:
        for index, group in enumerate(self.config.cache.groups):
            first = max(0, row.start - group.window + 1) if group.window else 0
            for position in range(first, row.start + row.count):
                slot = self.cache[index][self._slots(row, index, position)]
                assert slot == self._expected(row, position), "the cache holds something else"

    def _sample(self, row: Row) -> Sampled:
        sequence = self.known[row.sequence_id]
        sequence.computed += row.count
        end = row.start + row.count
        num_prompt = sequence.new.num_prompt
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if sequence.new.sampling.prompt_logprobs >= 0:
            told = range(row.start + 1, min(end + 1, num_prompt))
            prompt_logprobs = tuple(logprob(sequence.tokens, p) for p in told)
        if not row.sample:
            return Sampled(row.sequence_id, prompt_logprobs=prompt_logprobs)
        if sequence.new.task == "pool":
            return Sampled(row.sequence_id, pooled=(float(next_token(sequence.tokens)),))
        token = next_token(sequence.tokens)
        sequence.tokens.append(token)
        drawn = logprob(sequence.tokens, len(sequence.tokens) - 1)
        return Sampled(row.sequence_id, token, drawn, prompt_logprobs)


def logprob(tokens: list[int], position: int) -> TokenLogprobs:
    return TokenLogprobs(tokens[position], -float(position), 1)


@dataclass(frozen=True)
class Job:
    """A request, when it comes, and what its caller does with it."""

    request: SequenceRequest
    arrival: int
    stop_after: int | None
    abort_at: int | None


@dataclass(frozen=True)
class Case:
    """Everything a run depends on."""

    config: SchedulerConfig
    jobs: tuple[Job, ...]
    seed: int
    restarts: tuple[int, ...]


@dataclass
class Outcome:
    """What the caller of one request saw."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: tuple[float, ...] | None = None
    end: tuple[str, int | None] | None = None

    def take(self, update: SequenceUpdate) -> None:
        assert self.end is None, "news of a sequence that has ended"
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.pooled = update.pooled
        if update.finish_reason:
            self.end = (update.finish_reason, update.stop_reason)


def reference(job: Job, config: SchedulerConfig) -> Outcome:
    """The same request alone, one token at a time, undisturbed."""
    request = job.request
    tokens = [*request.prompt_token_ids]
    num_prompt = len(tokens)
    outcome = Outcome()
    if request.task == "pool":
        outcome.pooled = (float(next_token(tokens)),)
        outcome.end = ("stop", None)
        return outcome
    if request.sampling.prompt_logprobs >= 0:
        outcome.prompt_logprobs = [logprob(tokens, p) for p in range(1, num_prompt)]
    limit = config.max_model_len
    if request.max_tokens is not None:
        limit = min(limit, num_prompt + request.max_tokens)
    while outcome.end is None:
        tokens.append(next_token(tokens))
        outcome.logprobs.append(logprob(tokens, len(tokens) - 1))
        if tokens[-1] in request.stop_token_ids:
            outcome.end = ("stop", tokens[-1])
        elif len(tokens) == limit:
            outcome.end = ("length", None)
        elif len(tokens) - num_prompt == job.stop_after:
            outcome.end = ("string", None)
    outcome.token_ids = tokens[num_prompt:]
    return outcome


class Driver:
    """Plays engine and executor: feeds, delays, aborts, restarts, and checks after every call."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = random.Random(case.seed)
        self.scheduler = Scheduler(case.config)
        self.rank = FakeRank(case.config, 0)
        self.results: deque[StepResult] = deque()
        self.stale: list[StepResult] = []
        self.plans: list[StepPlan] = []
        self.outcomes = {job.request.sequence_id: Outcome() for job in case.jobs}
        self.tick = 0

    def drive(self) -> None:
        jobs = {job.request.sequence_id: job for job in self.case.jobs}
        while any(outcome.end is None for outcome in self.outcomes.values()):
            assert self.tick < 5_000, "some sequence never ends"
            self._tick(jobs)
            self.tick += 1
        while self.results:
            assert self.scheduler.accept(self.results.popleft()) == []
        assert self.scheduler.next_plan() is None
        assert not any(self.scheduler.num_used_blocks), "blocks leaked"

    def _tick(self, jobs: dict[int, Job]) -> None:
        for job in jobs.values():
            if job.arrival == self.tick:
                self.scheduler.add(job.request)
            if job.abort_at == self.tick and job.arrival <= self.tick:
                self._abort(job.request.sequence_id)
        if self.tick in self.case.restarts:
            self._restart()
        for _ in range(self.random.randint(0, 3)):
            self._plan()
        for _ in range(self.random.randint(0, 3)):
            if self.results:
                self._deliver(self.results.popleft(), jobs)
        if not self.results and self.scheduler.num_waiting + self.scheduler.num_running:
            assert self._plan(), "nothing in flight, something to do, and no plan"

    def _plan(self) -> bool:
        plan = self.scheduler.next_plan()
        self._check()
        if plan is None:
            return False
        self.plans.append(plan)
        self.results.append(self.rank.run(plan))
        return True

    def _deliver(self, result: StepResult, jobs: dict[int, Job]) -> None:
        if self.stale and self.random.random() < 0.5:
            assert self.scheduler.accept(self.stale.pop()) == []
        for update in self.scheduler.accept(result):
            outcome = self.outcomes[update.sequence_id]
            outcome.take(update)
            wanted = jobs[update.sequence_id].stop_after
            if outcome.end is None and wanted and len(outcome.token_ids) == wanted:
                outcome.end = ("string", None)
                self.scheduler.stop(update.sequence_id)
        self._check()

    def _abort(self, sequence_id: int) -> None:
        if self.outcomes[sequence_id].end is None:
            self.outcomes[sequence_id].end = ("abort", None)
        self.scheduler.abort(sequence_id)
        self._check()

    def _restart(self) -> None:
        epoch = self.scheduler.epoch + self.random.randint(1, 3)
        self.scheduler.restart(epoch)
        self.rank = FakeRank(self.case.config, epoch)
        self.stale += self.results
        self.results.clear()
        self._check()

    def _check(self) -> None:
        scheduler, config = self.scheduler, self.case.config
        assert scheduler.num_in_flight <= config.max_in_flight
        assert scheduler.num_running <= config.max_num_seqs
        waiting = list(scheduler._waiting)
        assert all(not any(s.blocks.held) for s in waiting), "a waiting sequence holds blocks"
        everyone = [*scheduler._running, *waiting]
        assert sorted(s.sequence_id for s in everyone) == sorted(scheduler._sequences)
        for group in range(len(config.cache.groups)):
            held = [b for s in scheduler._running for b in s.blocks.held[group]]
            assert len(held) == len(set(held)), "a block is held twice"
            assert len(held) == scheduler.num_used_blocks[group], "a block is held by nobody"


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    """Limits from comfortable to the least under which everything can still run."""
    block_size = draw(st.integers(1, 5))
    max_model_len = draw(st.integers(4, 36))
    groups = []
    for index, window in enumerate(
        draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 9]), min_size=1, max_size=2))
    ):
        least = peak_blocks(CacheGroup((), window, 0), block_size, max_model_len, 1)
        num_blocks = least + draw(st.integers(0, 2 * least))
        groups.append(CacheGroup((index,), window, num_blocks))
    num_micro_batches = draw(st.integers(1, 4))
    return SchedulerConfig(
        max_step_tokens=draw(st.integers(1, 40)),
        max_num_seqs=draw(st.integers(1, 8)),
        max_model_len=max_model_len,
        cache=CacheLayout(block_size, tuple(groups)),
        vocab_size=VOCAB,
        num_micro_batches=num_micro_batches,
        max_in_flight=num_micro_batches + draw(st.integers(0, 5)),
        recompute_lengths=tuple(sorted(draw(st.sets(st.integers(1, 30), max_size=2)))),
        min_chunk_tokens=draw(st.sampled_from([1, 4, 256])),
    )


@st.composite
def jobs(draw: st.DrawFn, sequence_id: int, max_model_len: int) -> Job:
    num_prompt = draw(st.integers(1, max_model_len - 1))
    rare = st.sampled_from([False, False, False, True])
    request = SequenceRequest(
        sequence_id=sequence_id,
        prompt_token_ids=tuple(
            draw(st.lists(st.integers(0, VOCAB - 1), min_size=num_prompt, max_size=num_prompt))
        ),
        sampling=SamplingSpec(prompt_logprobs=draw(st.sampled_from([-1, 0]))),
        max_tokens=draw(st.none() | st.integers(1, 20)),
        stop_token_ids=draw(st.sampled_from([(), (STOP,)])),
        task="pool" if draw(rare) else "generate",
    )
    arrival = draw(st.integers(0, 12))
    abort_at = arrival + draw(st.integers(0, 15)) if draw(rare) else None
    return Job(request, arrival, draw(st.none() | st.integers(1, 6)), abort_at)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    config = draw(configs())
    # Ids fall while arrivals rise: an order taken from ids would show.
    made = tuple(
        draw(jobs(100 - 7 * index, config.max_model_len))
        for index in range(draw(st.integers(1, 10)))
    )
    restarts = tuple(sorted(draw(st.sets(st.integers(1, 40), max_size=2))))
    return Case(config, made, draw(st.integers(0, 2**32 - 1)), restarts)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_request_gets_what_it_would_get_alone(case: Case) -> None:
    driver = Driver(case)
    driver.drive()
    for job in case.jobs:
        outcome = driver.outcomes[job.request.sequence_id]
        expected = reference(job, case.config)
        if outcome.end == ("abort", None):
            num_tokens = len(outcome.token_ids)
            num_prompt_logprobs = len(outcome.prompt_logprobs)
            assert outcome.token_ids == expected.token_ids[:num_tokens]
            assert outcome.prompt_logprobs == expected.prompt_logprobs[:num_prompt_logprobs]
        else:
            assert outcome == expected


@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_same_events_give_the_same_plans(case: Case) -> None:
    first, second = Driver(case), Driver(case)
    first.drive()
    second.drive()
    assert msgspec.msgpack.encode(first.plans) == msgspec.msgpack.encode(second.plans)


def crowded_case(**changes: object) -> Case:
    """Many sequences in few blocks: preemption without end would show here."""
    config = SchedulerConfig(
        max_step_tokens=16,
        max_num_seqs=16,
        max_model_len=48,
        cache=CacheLayout(2, (CacheGroup((0,), 0, 26), CacheGroup((1,), 6, 30))),
        vocab_size=VOCAB,
        recompute_lengths=(20,),
    )
    config = msgspec.structs.replace(config, **changes)
    made = tuple(
        Job(
            SequenceRequest(
                sequence_id=index, prompt_token_ids=(index % VOCAB,) * 5, max_tokens=40
            ),
            0,
            None,
            None,
        )
        for index in range(12)
    )
    return Case(config, made, 5, ())


@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("max_step_tokens", [3, 16])
@pytest.mark.parametrize("num_blocks", [26, 36])
def test_a_crowd_in_few_blocks_is_served_by_preemption(
    num_blocks: int, max_step_tokens: int, num_micro_batches: int
) -> None:
    case = crowded_case(
        max_step_tokens=max_step_tokens,
        cache=CacheLayout(2, (CacheGroup((0,), 0, num_blocks), CacheGroup((1,), 6, 30))),
        num_micro_batches=num_micro_batches,
        max_in_flight=2 * num_micro_batches,
    )
    driver = Driver(case)
    driver.drive()
    introduced = [n.sequence_id for p in driver.plans for n in p.lanes[0].new]
    assert len(introduced) > 2 * len(case.jobs), "each once, each anew past length 20, and more"
    for job in case.jobs:
        assert driver.outcomes[job.request.sequence_id] == reference(job, case.config)


def test_preemption_costs_a_bounded_share() -> None:
    driver = Driver(crowded_case(recompute_lengths=()))
    driver.drive()
    computed = sum(row.count for p in driver.plans for row in p.lanes[0].rows)
    assert computed < 2 * sum(5 + 39 for _ in driver.case.jobs)
