"""Loads on an engine in this process: token ids in, times out; no tokenizer takes part."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import msgspec

from spanwise.bench.job import EngineJob, EngineResult, Load, LoadRun, RequestTimes
from spanwise.bench.lengths import LengthRange, Lengths
from spanwise.engine.config import EngineConfig
from spanwise.engine.core import EngineCore
from spanwise.engine.language_launch import LanguageReplica, Started, launch
from spanwise.engine.launch import ReplicaHandle
from spanwise.errors import DeviceError, InputError
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.scheduler.update import SequenceUpdate

# Below stand special tokens in many vocabularies.
_FIRST_ID = 10
_WARMUP_TOKENS = 4


def run_engine(job: EngineJob, tell: Callable[[str], None]) -> EngineResult:
    """Start, warm up, measure, close. Raises InputError for what cannot be, and EngineError."""
    if job.num_cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.num_cores])
    started = launch(job.engine, Path(job.engine.model), tell)
    try:
        for load in job.loads:
            _check_room(load, job.engine, started)
        driver = Driver(started.replicas, started.scheduling, job.one_micro_batch)
        tell("warming up")
        for load in job.loads:
            driver.run(_warmup(load, len(started.replicas)), Random(f"warm-up/{job.seed}"))
        runs = []
        for number in range(job.num_runs):
            tell(f"run {number + 1} of {job.num_runs}")
            chance = Random(f"measured/{job.seed + number}")
            runs.append(tuple(driver.run(load, chance) for load in job.loads))
        driver.close()
    finally:
        started.close()
    return EngineResult(plan=started.plan, runs=tuple(runs))


@dataclass
class _Live:
    """A request on its way."""

    sent_s: float
    request: SequenceRequest
    first_s: float | None = None
    num_tokens: int = 0


class Driver:
    """Gives requests to a started engine, and notes when their tokens come."""

    def __init__(
        self,
        replicas: Sequence[LanguageReplica],
        scheduling: SchedulerConfig,
        one_micro_batch: bool = False,
    ) -> None:
        if one_micro_batch:
            scheduling = msgspec.structs.replace(scheduling, num_micro_batches=1, max_in_flight=1)
            replicas = [ReplicaHandle(Scheduler(scheduling), each.executor) for each in replicas]
        self._core = EngineCore(replicas)
        self._vocab_size = scheduling.vocab_size
        self._ids = count()

    def run(self, load: Load, chance: Random) -> LoadRun:
        """Run a load to its end; the same state of ``chance`` gives the same requests."""
        waiting = deque(self._requests(load, chance))
        limit = load.concurrency or len(waiting)
        live: dict[int, _Live] = {}
        times: dict[int, RequestTimes] = {}
        begin_s = time.perf_counter()
        while waiting or live:
            while waiting and len(live) < limit:
                request = waiting.popleft()
                live[request.sequence_id] = _Live(time.perf_counter() - begin_s, request)
                self._core.add(request, len(request.prompt_token_ids) + (request.max_tokens or 0))
            updates = self._core.feed(time.monotonic()) + self._core.wait()
            assert updates or self._core.num_in_flight, "nothing can be planned"
            now_s = time.perf_counter() - begin_s
            for update in updates:
                self._take(update, now_s, live, times)
        return LoadRun(tuple(times[sequence_id] for sequence_id in sorted(times)))

    def close(self) -> None:
        """Let the engine go; it is the caller's to close."""
        self._core.close()

    def _take(
        self,
        update: SequenceUpdate,
        now_s: float,
        live: dict[int, _Live],
        times: dict[int, RequestTimes],
    ) -> None:
        state = live[update.sequence_id]
        state.num_tokens += len(update.token_ids)
        if state.first_s is None and update.token_ids:
            state.first_s = now_s
        if update.finish_reason is None:
            return
        assert state.first_s is not None and state.num_tokens == state.request.max_tokens
        del live[update.sequence_id]
        times[update.sequence_id] = RequestTimes(
            sent_s=state.sent_s,
            first_s=state.first_s,
            end_s=now_s,
            input_tokens=len(state.request.prompt_token_ids),
            output_tokens=state.num_tokens,
        )

    def _requests(self, load: Load, chance: Random) -> list[SequenceRequest]:
        lowest = min(_FIRST_ID, self._vocab_size - 1)
        lengths = [
            (load.input_len.draw(chance), load.output_len.draw(chance))
            for _ in range(load.num_requests)
        ]
        return [
            SequenceRequest(
                sequence_id=next(self._ids),
                prompt_token_ids=tuple(
                    chance.randrange(lowest, self._vocab_size) for _ in range(num_input)
                ),
                max_tokens=num_output,
            )
            for num_input, num_output in lengths
        ]


def _warmup(load: Load, num_replicas: int) -> Load:
    """A little of a load: what is done first once is then done, on every replica."""
    return Load(
        num_requests=min(load.num_requests, 2 * num_replicas),
        input_len=load.input_len,
        output_len=Lengths((LengthRange(1, min(load.output_len.longest, _WARMUP_TOKENS)),)),
    )


def _check_room(load: Load, engine: EngineConfig, started: Started) -> None:
    """Refuse what would not run as it is called: the figures would mislead."""
    longest = load.input_len.longest + load.output_len.longest
    if longest > started.plan.max_model_len:
        raise InputError(
            f"input and output of {longest} tokens are more than max_model_len "
            f"{started.plan.max_model_len}; lower --input-len or --output-len"
        )
    if not load.is_batch:
        return
    together = -(-load.num_requests // len(started.replicas))
    if together > engine.max_num_seqs:
        raise InputError(
            f"{together} sequences together are more than max_num_seqs {engine.max_num_seqs}; "
            "raise --max-num-seqs or lower the batch size"
        )
    num_tokens = together * -(-longest // engine.block_size) * engine.block_size
    if num_tokens > started.plan.cache_tokens:
        raise DeviceError(
            f"{together} sequences of {longest} tokens together take {num_tokens} tokens of KV "
            f"cache, {started.plan.cache_tokens} fit; raise --kv-cache-memory or lower the batch "
            "size"
        )
