"""Stand-ins for model and runner: what the processes call, without torch or weights."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
from pathlib import Path

from spanwise.errors import ModelError
from spanwise.types.model import ModelFacts
from spanwise.types.plan import LaneResult, Sampled, StepPlan, StepResult
from spanwise.types.worker import ShardSpec, WorkerSpec


class FakeShard:
    """A block of memory, all of it touched."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page = b"\1" * (1 << 20)
        for _ in range(num_bytes >> 20):
            self.memory.write(page)
        self.weight_bytes = num_bytes


def describe(folder: str, dtype: str) -> ModelFacts:
    """Facts of a model that does not exist; the folder says what goes wrong."""
    _misbehave(folder)
    return ModelFacts(
        architecture=f"Fake in {folder} as {dtype}",
        model_type="fake",
        num_layers=2,
        hidden_size=8,
        vocab_size=16,
        max_position=32,
        num_attention_heads=2,
        num_kv_heads=2,
        intermediate_size=16,
        num_experts=0,
        tied_embeddings=False,
        layer_bytes=(1, 1),
        first_bytes=1,
        last_bytes=1,
        layer_caches=(),
    )


def load_shard(spec: ShardSpec) -> FakeShard:
    """As many MB as the folder's name ends with."""
    _misbehave(spec.folder)
    digits = spec.folder.rpartition("-")[2]
    return FakeShard(int(digits) << 20 if digits.isdigit() else 0)


def open_comm(segment_fd: int, spec: WorkerSpec, may_spin: bool) -> bool:
    """Nothing to talk through."""
    os.fstat(segment_fd)
    return may_spin


class FakeRunner:
    """Obeys the plan: the first token of the first new sequence is an order, by ``ORDERS``."""

    def __init__(
        self, shard: FakeShard, spec: WorkerSpec, comm: object, arena: mmap.mmap | None
    ) -> None:
        self._weights = shard.memory
        self._spec = spec
        self._arena = arena
        self._speaks = spec.shard.is_last and spec.shard.tp_rank == 0
        if spec.shard.folder == "fails-to-start":
            raise ValueError("no such\nattention")

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Tell what this rank sees, or do what is ordered."""
        new = [sequence for lane in plan.lanes for sequence in lane.new]
        if new and new[0].sequence_id in (-1, self._rank()):
            ORDERS[new[0].token_ids[0]]()
        if not self._speaks:
            return None
        sampled = tuple(Sampled(each.sequence_id, self._token(each.token_ids)) for each in new)
        return StepResult(plan.epoch, plan.step, (LaneResult(sampled),))

    def _rank(self) -> int:
        return self._spec.shard.pp_rank * self._spec.shard.tp_size + self._spec.shard.tp_rank

    def _token(self, token_ids: tuple[int, ...]) -> int:
        if token_ids[0] == READ_WEIGHTS:
            return sum(self._weights[:: mmap.PAGESIZE])
        if token_ids[0] == COUNT_ARENA:
            assert self._arena is not None
            self._arena[0] = (self._arena[0] + 1) % 256
            return self._arena[0]
        return len(token_ids)


def _misbehave(folder: str) -> None:
    match folder:
        case "missing":
            raise ModelError("missing is no model folder: give one that has a config.json")
        case "broken":
            raise ValueError("cannot\nread this")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "slow":
            _spin()


def _spin() -> None:
    while True:
        pass


def _sleep() -> None:
    time.sleep(0.05)


def _raise() -> None:
    raise IndexError("no block 7")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _nothing() -> None:
    return


NOTHING, SPIN, SLEEP, RAISE, DIE, READ_WEIGHTS, COUNT_ARENA = range(7)
ORDERS = (_nothing, _spin, _sleep, _raise, _die, _nothing, _nothing)


def main(num_workers: int) -> None:
    """A supervising script: start workers, print the pids, never stop."""
    from process_helpers import FAKES, replica_spec  # the parent of this script knows the path

    from spanwise.worker.supervisor import Supervisor

    supervisor = Supervisor(FAKES)
    specs = replica_spec(tp_size=num_workers)
    supervisor.load([worker.shard for worker in specs.workers])
    supervisor.spawn([specs])
    print(*supervisor.pids(), flush=True)
    Path("/dev/stdin").read_bytes()


if __name__ == "__main__":
    main(int(sys.argv[1]))
