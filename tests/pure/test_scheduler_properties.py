"""The scheduler against a rank that trusts nothing, under random load, delay, abort and restart."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pure.fake_rank import VOCAB, FakeRank, logprob, next_token

from spanwise.cost.blocks import peak_blocks
from spanwise.scheduler.blocks import BlockPool
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.cache import CacheGroup, CacheLayout
from spanwise.types.plan import StepPlan, StepResult, TokenLogprobs
from spanwise.types.sampling import SamplingSpec

STOP = 3


@dataclass(frozen=True)
class Job:
    """A request, when it comes, and what its caller does with it."""

    request: SequenceRequest
    arrival: int
    stop_after: int | None = None
    abort_at: int | None = None
    withdraw_at: int | None = None


@dataclass(frozen=True)
class Case:
    """Everything a run depends on."""

    config: SchedulerConfig
    jobs: tuple[Job, ...]
    seed: int
    restarts: tuple[int, ...] = ()


@dataclass
class Outcome:
    """What the caller of one request saw."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: tuple[float, ...] | None = None
    end: tuple[str, int | None] | None = None
    cached: list[int] = field(default_factory=list, compare=False)

    def take(self, update: SequenceUpdate) -> None:
        assert self.end is None, "news of a sequence that has ended"
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.pooled = update.pooled
        self.cached.append(update.num_cached_tokens)
        if update.finish_reason:
            self.end = (update.finish_reason, update.stop_reason)


def reference(job: Job, config: SchedulerConfig) -> Outcome:
    """The same request alone, one token at a time, undisturbed."""
    request = job.request
    tokens = [*request.prompt_token_ids]
    num_prompt = len(tokens)
    outcome = Outcome()
    if request.task != "generate":
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
    """Plays engine and executor: feeds, delays, aborts, restarts, and checks after every call.

    The clock shows the tick.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = random.Random(case.seed)
        self.scheduler = Scheduler(case.config)
        self.jobs = {job.request.sequence_id: job for job in case.jobs}
        self.salts = {i: job.request.cache_salt for i, job in self.jobs.items()}
        self.rank = FakeRank(case.config, 0, self.salts)
        self.results: deque[StepResult] = deque()
        self.stale: list[StepResult] = []
        self.plans: list[StepPlan] = []
        self.outcomes = {sequence_id: Outcome() for sequence_id in self.jobs}
        self.arrived: list[int] = []
        self.found: dict[int, int] = {}  # of those that have begun: tokens found at first
        self.num_found = 0
        self.batch: set[int] = set()
        self.tick = 0
        self.now_s = 0.0  # of results, on a clock of its own: times vary, tokens must not

    def drive(self) -> None:
        while any(outcome.end is None for outcome in self.outcomes.values()):
            assert self.tick < 5_000, "some sequence never ends"
            self._tick()
            self.tick += 1
        while self.results:
            assert self.scheduler.accept(self.results.popleft()) == []
        assert self.scheduler.next_plan(self.tick) is None
        assert self.scheduler.wake_at_s is None
        assert not any(self.scheduler.num_used_blocks), "blocks leaked"
        self._check_stats()

    def _tick(self) -> None:
        for sequence_id, job in self.jobs.items():
            if job.arrival == self.tick:
                self.scheduler.add(job.request)
                self.arrived.append(sequence_id)
            if job.abort_at == self.tick and job.arrival <= self.tick:
                self._abort(sequence_id)
            if job.withdraw_at == self.tick and job.arrival <= self.tick:
                self._withdraw(sequence_id)
        if self.tick in self.case.restarts:
            self._restart()
        if self.random.random() < 0.7:
            self._expire()
        for _ in range(self.random.randint(0, 3)):
            self._plan()
        for _ in range(self.random.randint(0, 3)):
            if self.results:
                self._deliver(self.results.popleft())
        if not self.results and self.scheduler.num_waiting + self.scheduler.num_running:
            self._make_progress()

    def _make_progress(self) -> None:
        if self._plan():
            return
        assert self.case.config.batching != "continuous", "nothing in flight, and no plan"
        self._expire()
        if not self.scheduler.num_waiting:
            return
        wake_at_s = self.scheduler.wake_at_s
        assert wake_at_s is not None and wake_at_s > self.tick, "time changes nothing, and no plan"

    def _plan(self) -> bool:
        plan = self.scheduler.next_plan(float(self.tick))
        self._check()
        if plan is None:
            return False
        self._check_turns(plan)
        self.plans.append(plan)
        self.results.append(self.rank.run(plan))
        return True

    def _check_turns(self, plan: StepPlan) -> None:
        """Who begins did so before all that come after it."""
        starts = {row.sequence_id: row.start for row in plan.lanes[0].rows}
        size = self.case.config.cache.block_size
        if not self._unfinished(self.batch):
            self.batch.clear()
        for new in plan.lanes[0].new:
            if self.jobs[new.sequence_id].request.sampling.prompt_logprobs < 0:
                self.num_found += starts[new.sequence_id]
            if new.sequence_id in self.found:
                continue
            self.found[new.sequence_id] = min(starts[new.sequence_id], new.num_prompt)
            self.batch.add(new.sequence_id)
            request = self.jobs[new.sequence_id].request
            for other in self._unfinished(self.arrived[: self.arrived.index(new.sequence_id)]):
                before = self.jobs[other].request
                if before.tenant != request.tenant or before.priority > request.priority:
                    continue
                shares = any(
                    before.prompt_token_ids[:size] == self.jobs[i].request.prompt_token_ids[:size]
                    for i in self.jobs
                    if i != other
                )
                assert other in starts or other in self.found or shares, "overtaken"
        if self.case.config.batching != "continuous":
            assert len(self.batch) <= (self.case.config.batch_size or self.case.config.max_num_seqs)

    def _unfinished(self, sequence_ids: list[int] | set[int]) -> list[int]:
        return [i for i in sequence_ids if self.outcomes[i].end is None]

    def _deliver(self, result: StepResult) -> None:
        if self.stale and self.random.random() < 0.5:
            assert self.scheduler.accept(self.stale.pop()) == []
        self.now_s += self.random.random() ** 4
        for update in self.scheduler.accept(result, self.now_s):
            outcome = self.outcomes[update.sequence_id]
            outcome.take(update)
            wanted = self.jobs[update.sequence_id].stop_after
            if outcome.end is None and wanted and len(outcome.token_ids) == wanted:
                outcome.end = ("string", None)
                self.scheduler.stop(update.sequence_id)
        self._check()

    def _abort(self, sequence_id: int) -> None:
        if self.outcomes[sequence_id].end is None:
            self.outcomes[sequence_id].end = ("abort", None)
        self.scheduler.abort(sequence_id)
        self._check()

    def _withdraw(self, sequence_id: int) -> None:
        has_ended = self.outcomes[sequence_id].end is not None
        can_go = not has_ended and sequence_id not in self.found
        assert (sequence_id in self.scheduler.withdrawable()) == can_go
        request = self.scheduler.withdraw(sequence_id)
        assert (request is not None) == can_go
        if request is not None:
            assert request == self.jobs[sequence_id].request
            self.outcomes[sequence_id].end = ("withdrawn", None)
        self._check()

    def _expire(self) -> None:
        late = {
            sequence_id
            for sequence_id in self._unfinished(self.arrived)
            if sequence_id not in self.found and self._deadline_s(sequence_id) <= self.tick
        }
        updates = self.scheduler.expire(float(self.tick))
        assert {update.sequence_id for update in updates} == late
        for update in updates:
            assert update == SequenceUpdate(
                sequence_id=update.sequence_id, finish_reason="deadline"
            )
            self.outcomes[update.sequence_id].take(update)
        self._check()

    def _deadline_s(self, sequence_id: int) -> float:
        deadline_s = self.jobs[sequence_id].request.deadline_s
        return float("inf") if deadline_s is None else deadline_s

    def _restart(self) -> None:
        epoch = self.scheduler.epoch + self.random.randint(1, 3)
        self.scheduler.restart(epoch)
        self.rank = FakeRank(self.case.config, epoch, self.salts)
        self.stale += self.results
        self.results.clear()
        self._check()

    def _check(self) -> None:
        scheduler, config = self.scheduler, self.case.config
        assert scheduler.num_in_flight <= config.max_in_flight
        assert scheduler.num_running <= config.max_num_seqs
        waiting = list(scheduler._waiting)
        assert len(waiting) == scheduler.num_waiting
        assert all(not any(s.blocks.held) for s in waiting), "a waiting sequence holds blocks"
        if all(not s.num_in_flight for s in waiting):
            assert sum(len(s.tokens) for s in waiting) >= scheduler.num_waiting_tokens
        everyone = [*scheduler._running, *waiting]
        assert sorted(s.sequence_id for s in everyone) == sorted(scheduler._sequences)
        for group, pool in enumerate(scheduler._pools):
            held = Counter(b for s in scheduler._running for b in s.blocks.held[group])
            check_pool(pool, held)

    def _check_stats(self) -> None:
        stats = self.scheduler.stats
        rows = [row for plan in self.plans for row in plan.lanes[0].rows]
        computed = sum(row.count for row in rows)
        assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (0, 0, 0)
        assert stats.num_steps == len(self.plans)
        assert stats.planned_prefill_tokens + stats.planned_decode_tokens == computed
        assert stats.num_admitted == len(self.found)
        assert stats.prefix_hit_tokens == self.num_found <= stats.prefix_queried_tokens
        ends = Counter(outcome.end[0] for outcome in self.outcomes.values() if outcome.end)
        ends["stop"] += ends.pop("string", 0)
        del ends["withdrawn"]
        assert Counter(stats.finished) == +ends
        assert stats.num_expired == ends["deadline"]


def check_pool(pool: BlockPool, held: Counter[int]) -> None:
    """Each block is held as often as the pool thinks, or free once; only full ones are shared."""
    assert dict(held) == {b: n for b, n in enumerate(pool._holders) if n}
    free = [*pool._blank, *pool._kept]
    assert sorted([*held, *free]) == list(range(pool.num_blocks))
    assert pool.num_used == len(held)
    assert all(block in pool._index for block, count in held.items() if count > 1)
    assert all(block in pool._index for block in pool._kept)
    assert not any(block in pool._index for block in pool._blank)
    blocks, keys = pool._index._block_of, pool._index._key_of
    assert {block: key for key, block in blocks.items()} == keys and len(keys) == len(blocks)


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
        num_blocks = least + draw(st.integers(0, 3 * least))
        groups.append(CacheGroup((index,), window, num_blocks))
    num_micro_batches = draw(st.integers(1, 4))
    max_num_seqs = draw(st.integers(1, 8))
    return SchedulerConfig(
        max_step_tokens=draw(st.integers(1, 40)),
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        cache=CacheLayout(block_size, tuple(groups)),
        vocab_size=VOCAB,
        num_micro_batches=num_micro_batches,
        max_in_flight=num_micro_batches + draw(st.integers(0, 5)),
        recompute_lengths=tuple(sorted(draw(st.sets(st.integers(1, 30), max_size=2)))),
        min_chunk_tokens=draw(st.sampled_from([1, 4, 256])),
        prefix_caching=draw(st.sampled_from([True, True, True, False])),
        batching=draw(st.sampled_from(["continuous", "continuous", "dynamic", "static"])),
        batch_size=draw(st.none() | st.integers(1, max_num_seqs)),
        batch_window_s=draw(st.sampled_from([0.0, 0.5, 3.0])),
    )


def tokens(min_size: int, max_size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, VOCAB - 1), min_size=min_size, max_size=max_size)


@st.composite
def jobs(draw: st.DrawFn, sequence_id: int, max_model_len: int, stems: list[list[int]]) -> Job:
    """A request whose prompt goes on from where many prompts begin."""
    stem = draw(st.sampled_from(stems))
    begin = stem[: draw(st.integers(0, len(stem)))]
    longest = max_model_len - 1 - len(begin)
    prompt = begin + draw(tokens(0 if begin else 1, longest))
    rare = st.sampled_from([False, False, False, True])
    arrival = draw(st.integers(0, 12))

    def sometimes_after(most: int) -> int | None:
        return arrival + draw(st.integers(0, most)) if draw(rare) else None

    request = SequenceRequest(
        sequence_id=sequence_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingSpec(prompt_logprobs=draw(st.sampled_from([-1, -1, 0]))),
        max_tokens=draw(st.none() | st.integers(1, 20)),
        stop_token_ids=draw(st.sampled_from([(), (STOP,)])),
        task=draw(st.sampled_from(["generate"] * 6 + ["pool_last", "pool_mean"])),
        priority=draw(st.sampled_from([0, 0, 0, -1, 2])),
        tenant=draw(st.sampled_from(["", "", "a", "b"])),
        deadline_s=sometimes_after(10),
        cache_salt=draw(st.sampled_from(["", "", "", "a"])),
    )
    stop_after = draw(st.none() | st.integers(1, 6))
    return Job(request, arrival, stop_after, sometimes_after(15), sometimes_after(6))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    config = draw(configs())
    stems = draw(st.lists(tokens(1, config.max_model_len - 1), min_size=1, max_size=2))
    # Ids fall while arrivals rise: an order taken from ids would show.
    made = tuple(
        draw(jobs(100 - 7 * index, config.max_model_len, stems))
        for index in range(draw(st.integers(1, 10)))
    )
    restarts = tuple(sorted(draw(st.sets(st.integers(1, 40), max_size=2))))
    return Case(config, made, draw(st.integers(0, 2**32 - 1)), restarts)


@settings(max_examples=250, deadline=None)
@given(cases())
def test_every_request_gets_what_it_would_get_alone(case: Case) -> None:
    driver = Driver(case)
    driver.drive()
    for job in case.jobs:
        sequence_id = job.request.sequence_id
        outcome = driver.outcomes[sequence_id]
        expected = reference(job, case.config)
        if outcome.end in (("deadline", None), ("withdrawn", None)):
            assert outcome == Outcome(end=outcome.end)
            assert sequence_id not in driver.found
        elif outcome.end == ("abort", None):
            num_tokens = len(outcome.token_ids)
            num_prompt_logprobs = len(outcome.prompt_logprobs)
            assert outcome.token_ids == expected.token_ids[:num_tokens]
            assert outcome.prompt_logprobs == expected.prompt_logprobs[:num_prompt_logprobs]
        else:
            assert outcome == expected
            assert outcome.cached[0] == driver.found[sequence_id]
            assert not any(outcome.cached[1:])


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
        )
        for index in range(12)
    )
    return Case(config, made, 5)


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
