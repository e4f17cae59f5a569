"""Several replicas as one: who takes what, and that none idles while others have work waiting."""

from __future__ import annotations

import os
import time
from collections import Counter, deque

from spanwise.engine.core import EngineCore
from spanwise.engine.launch import ReplicaHandle
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.types.cache import CacheGroup, CacheLayout
from spanwise.types.plan import LaneResult, Sampled, StepPlan, StepResult


class InstantExecutor:
    """Answers every plan when asked, with token 7."""

    def __init__(self) -> None:
        self.plans: deque[StepPlan] = deque()
        self.seen: list[int] = []
        self._read, self._write = os.pipe()

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self.seen += [row.sequence_id for row in plan.lanes[0].rows]
        os.write(self._write, b"\0")

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        return self.results()

    def results(self) -> list[StepResult]:
        if not self.plans:
            return []
        os.read(self._read, 1)
        plan = self.plans.popleft()
        drawn = tuple(Sampled(row.sequence_id, 7) for row in plan.lanes[0].rows)
        return [StepResult(plan.epoch, plan.step, (LaneResult(drawn),))]

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def make(
    num_replicas: int, max_num_seqs: int
) -> tuple[EngineCore[SequenceRequest], list[InstantExecutor]]:
    layers = CacheGroup(layers=(0,), num_blocks=400, window=0)
    config = SchedulerConfig(
        max_step_tokens=64,
        max_num_seqs=max_num_seqs,
        max_model_len=256,
        cache=CacheLayout(block_size=4, groups=(layers,)),
        vocab_size=100,
    )
    executors = [InstantExecutor() for _ in range(num_replicas)]
    handles = [ReplicaHandle(Scheduler(config), executor) for executor in executors]
    return EngineCore(handles), executors


def run(core: EngineCore[SequenceRequest]) -> Counter[int]:
    """To the end: how many tokens each sequence got."""
    got: Counter[int] = Counter()
    updates = core.feed(time.monotonic())
    while core.num_in_flight:
        updates += core.wait()
        updates += core.feed(time.monotonic())
    for update in updates:
        got[update.sequence_id] += len(update.token_ids)
    return got


def request(sequence_id: int, num_prompt: int, num_tokens: int) -> SequenceRequest:
    prompt = tuple((sequence_id * 31 + i) % 90 for i in range(num_prompt))
    return SequenceRequest(sequence_id=sequence_id, prompt_token_ids=prompt, max_tokens=num_tokens)


def test_each_replica_takes_its_share_and_all_ends() -> None:
    core, executors = make(3, 4)
    for sequence_id in range(30):
        core.add(request(sequence_id, 5, 10), 15)
    assert run(core) == dict.fromkeys(range(30), 10)
    shares = [len(set(executor.seen)) for executor in executors]
    assert min(shares) >= 9, "at the end one may move, not more"
    core.close()
    for executor in executors:
        executor.close()


def test_what_waits_moves_to_a_replica_that_has_nothing_to_do() -> None:
    """One replica was given long answers, as it turned out; the other is through at once."""
    core, executors = make(2, 1)
    for sequence_id in range(8):
        core.add(request(sequence_id, 4, 200 if sequence_id % 2 == 0 else 1), 100)
    assert run(core) == {i: 200 if i % 2 == 0 else 1 for i in range(8)}
    assert any(each % 2 == 0 for each in executors[1].seen), "nothing was moved"
    assert not set(executors[0].seen) & set(executors[1].seen), "a sequence ran twice"
    core.close()
    for executor in executors:
        executor.close()


def test_a_shared_prefix_goes_where_it_was_computed() -> None:
    core, executors = make(2, 8)
    prefix = tuple(range(40))

    def with_prefix(sequence_id: int) -> SequenceRequest:
        return SequenceRequest(
            sequence_id=sequence_id, prompt_token_ids=(*prefix, 50 + sequence_id), max_tokens=2
        )

    core.add(with_prefix(0), 43)
    run(core)
    for sequence_id in range(1, 4):
        core.add(with_prefix(sequence_id), 43)
    run(core)
    homes = [set(executor.seen) for executor in executors]
    assert {0, 1, 2, 3} in homes
    core.close()
    for executor in executors:
        executor.close()
