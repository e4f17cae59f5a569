"""What the processes run, named by dotted paths: imported only where it is needed."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Protocol

import msgspec

from spanwise.types.plan import StepPlan, StepResult
from spanwise.types.worker import ShardInfo


class LoadedShard(Protocol):
    """The loaded weights of one rank."""

    def info(self) -> ShardInfo:
        """What they are, for sizing the cache."""
        ...


class StepRunner(Protocol):
    """One rank's step."""

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run a step; the result exists on one rank of a replica only."""
        ...


class Entries(msgspec.Struct, frozen=True, kw_only=True):
    """``module:name`` of each thing the processes call; the real ones unless a test says otherwise.

    ``describe(source)``, ``describe_shard(shard_spec)``, ``load(shard_spec)``,
    ``card(worker_spec, arena_bytes)`` (a shard and an arena), ``store(listener)``,
    ``comm(segment_fd, worker_spec, may_spin)``, ``runner(shard, worker_spec, comm, arena)``,
    ``memory(device_spec)`` (bytes in use and in all).
    ``preload`` is imported once, in the fork server.
    """

    describe: str = "spanwise.model.load:describe"
    describe_shard: str = "spanwise.model.load:describe_shard"
    load: str = "spanwise.model.load:load_shard"
    card: str = "spanwise.worker.card:start_on_card"
    store: str = "spanwise.comm.nccl:serve_store"
    comm: str = "spanwise.worker.rank_comm:open_comm"
    runner: str = "spanwise.runner.start:start_runner"
    memory: str = "spanwise.device.memory:memory_use"
    preload: tuple[str, ...] = ("torch", "transformers")

    def import_all(self) -> None:
        """Import everything, so that forked children need not."""
        for module in self.preload:
            importlib.import_module(module)
        set_threads(1)
        used = (self.describe, self.describe_shard, self.load, self.comm, self.runner, self.memory)
        for entry in used:
            resolve(entry)


def resolve(entry: str) -> Any:
    """Import what ``module:name`` names."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def set_threads(num_threads: int) -> None:
    """Let torch compute with so many threads, where torch is what computes."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(num_threads)
