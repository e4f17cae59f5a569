"""A whole replica in one process: its ranks are threads, its scheduler the real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from tests.support.shards import shard_specs

from spanwise.comm.segment import SegmentLayout, create_segment
from spanwise.comm.shared_memory import open_rank_comm
from spanwise.cost.memory import CacheWish, RankMemory, arena_bytes, size_cache
from spanwise.model.facts import describe
from spanwise.model.shard import Shard, load_shard
from spanwise.runner.runner import Runner
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.types.model import ModelFacts
from spanwise.types.plan import StepPlan, StepResult, TokenLogprobs
from spanwise.types.sampling import SamplingSpec
from spanwise.types.worker import DeviceSpec, RankPlace, WorkerSpec

MAX_LEN = 96


class Replica:
    """Runs one model on ``pp x tp`` threads.

    ``spoil`` is given each loaded shard before it runs: tests break things with it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pp: int = 1,
        tp: int = 1,
        expert_parallel: bool = False,
        max_step_tokens: int = 64,
        spoil: Callable[[Shard], None] = lambda _: None,
        facts: Callable[[ModelFacts], ModelFacts] = lambda given: given,
    ) -> None:
        self.facts = facts(describe(str(folder), "float32"))
        specs = shard_specs(folder, pp, tp, expert_parallel, self.facts.num_layers)
        self.shards = [load_shard(spec) for spec in specs]
        for shard in self.shards:
            spoil(shard)
        memory = [
            RankMemory(
                name="rank",
                layer_caches=shard.layer_caches,
                value_bytes=4,
                available_bytes=1 << 26,
            )
            for shard in self.shards
        ]
        wish = CacheWish(
            block_size=4, max_num_seqs=16, max_model_len=MAX_LEN, max_step_tokens=max_step_tokens
        )
        self.cache = size_cache(self.facts.layer_caches, memory, wish)
        in_flight = 2 if pp == 1 else 2 * pp
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_step_tokens=max_step_tokens,
                max_num_seqs=16,
                max_model_len=MAX_LEN,
                cache=self.cache,
                vocab_size=self.facts.vocab_size,
                num_micro_batches=pp,
                max_in_flight=in_flight,
                recompute_lengths=self.facts.recompute_lengths,
            )
        )
        segment = create_segment("test", SegmentLayout(pp, tp, num_link_slots=in_flight + 1))
        self.runners = []
        for shard, spec in zip(self.shards, specs, strict=True):
            worker = WorkerSpec(
                place=RankPlace(pp=spec.pp_rank, tp=spec.tp_rank),
                device=DeviceSpec(kind="cpu"),
                shard=spec,
                cache=self.cache,
                epoch=0,
                max_step_tokens=max_step_tokens,
                max_in_flight=in_flight,
                max_model_len=MAX_LEN,
            )
            comm = open_rank_comm(segment, spec.pp_rank, spec.tp_rank, spin_s=0, timeout_s=120)
            arena = bytearray(arena_bytes(shard.layer_caches, 4, self.cache))
            self.runners.append(Runner(shard, worker, comm, arena))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sequence[SamplingSpec]
    ) -> tuple[list[list[int]], list[list[TokenLogprobs]]]:
        """Tokens and logprobs of every prompt."""
        for index, (prompt, spec) in enumerate(zip(prompts, sampling, strict=True)):
            self.scheduler.add(
                SequenceRequest(
                    sequence_id=index,
                    prompt_token_ids=tuple(prompt),
                    sampling=spec,
                    max_tokens=max_tokens,
                )
            )
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in prompts]
        while self.scheduler.num_waiting or self.scheduler.num_running:
            plans = []
            while (plan := self.scheduler.next_plan()) is not None:
                plans.append(plan)
            for result in self._execute(plans):
                for update in self.scheduler.accept(result):
                    tokens[update.sequence_id] += update.token_ids
                    logprobs[update.sequence_id] += update.logprobs
        return tokens, logprobs

    def _execute(self, plans: Sequence[StepPlan]) -> list[StepResult]:
        """Every rank runs all plans, as its own thread."""
        # Through the encoding, as between processes.
        plans = msgspec.msgpack.decode(msgspec.msgpack.encode(plans), type=list[StepPlan])
        results: list[StepResult] = []
        errors: list[BaseException] = []

        def work(runner: Runner) -> None:
            try:
                for plan in plans:
                    result = runner.execute(plan)
                    if result is not None:
                        results.append(result)
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(r,)) for r in self.runners[1:]]
        for thread in threads:
            thread.start()
        work(self.runners[0])
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results
