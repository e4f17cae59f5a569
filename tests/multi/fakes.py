"""Stand-ins for model and runner: what the processes call, without torch or weights."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import threading
import time

from spanwise.comm.segment import Segment, SegmentLayout
from spanwise.errors import CommunicationError, DeviceError, ModelError, WaitInterruptedError
from spanwise.types.cache import CacheLayout
from spanwise.types.model import ModelFacts, ModelSource
from spanwise.types.plan import LanePlan, LaneResult, NewSequence, Sampled, StepPlan, StepResult
from spanwise.types.sampling import SamplingSpec
from spanwise.types.worker import DeviceSpec, RankPlace, ShardInfo, ShardSpec, WorkerSpec
from spanwise.worker.entries import Entries
from spanwise.worker.local import LocalProcessExecutor
from spanwise.worker.replica import ReplicaSpec
from spanwise.worker.supervisor import Supervisor


class FakeShard:
    """A block of memory, all of it touched."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page = b"\1" * (1 << 20)
        for _ in range(num_bytes >> 20):
            self.memory.write(page)
        self._num_bytes = num_bytes

    def info(self) -> ShardInfo:
        return ShardInfo(
            weight_bytes=self._num_bytes, value_bytes=4, hidden_size=8, layer_caches={}
        )


def describe(source: ModelSource) -> ModelFacts:
    """Facts of a model that does not exist; the folder says what goes wrong."""
    _misbehave(source.folder)
    return ModelFacts(
        architecture=f"Fake in {source.folder} as {source.dtype}",
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


def describe_shard(spec: ShardSpec) -> ShardInfo:
    """The same without the bytes."""
    return load_shard(spec).info()


def start_on_card(spec: WorkerSpec, arena_bytes: int) -> tuple[FakeShard, bytearray]:
    """A card that is ordinary memory."""
    if spec.shard.folder == "full":
        raise DeviceError(f"{spec.device} has no room for the KV cache")
    return load_shard(spec.shard), bytearray(arena_bytes)


def serve_store(listener: socket.socket) -> socket.socket:
    """Answers nobody, but the socket takes connections."""
    return listener


def open_comm(segment_fd: int, spec: WorkerSpec, may_spin: bool) -> Segment:
    """Only the part that breaks waits."""
    return Segment(segment_fd)


def memory_use(spec: DeviceSpec) -> tuple[int, int]:
    """A third of a device of 3 KiB."""
    return 1 << 10, 3 << 10


class FakeRunner:
    """Obeys the plan: a new sequence's first token is an order, by ``ORDERS``, to one rank or all.

    The order ``AWAIT`` is a collective that never ends.
    """

    def __init__(self, shard: FakeShard, spec: WorkerSpec, comm: Segment, arena: mmap.mmap) -> None:
        self._weights = shard.memory
        self._spec = spec
        self._segment = comm
        self._arena = arena
        self._speaks = spec.shard.is_last and spec.shard.tp_rank == 0
        if spec.shard.folder == "fails-to-start":
            raise ValueError("no such attention\nframe 0")

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Tell what this rank sees, or do what is ordered."""
        new = [sequence for lane in plan.lanes for sequence in lane.new]
        for sequence in new:
            if sequence.sequence_id in (-1, self._rank()):
                self._obey(sequence.token_ids[0])
        if not self._speaks:
            return None
        sampled = tuple(Sampled(each.sequence_id, self._token(each.token_ids)) for each in new)
        return StepResult(plan.epoch, plan.step, (LaneResult(sampled),))

    def _obey(self, order: int) -> None:
        while order == AWAIT and not self._segment.interrupted:
            time.sleep(0.01)
        if order == AWAIT:
            raise WaitInterruptedError("waiting for rank 9 was interrupted")
        ORDERS[order]()

    def _rank(self) -> int:
        return self._spec.shard.pp_rank * self._spec.shard.tp_size + self._spec.shard.tp_rank

    def _token(self, token_ids: tuple[int, ...]) -> int:
        if token_ids[0] == READ_WEIGHTS:
            return sum(self._weights[:: mmap.PAGESIZE])
        if token_ids[0] == COUNT_ARENA:
            self._arena[0] = (self._arena[0] + 1) % 256
            return self._arena[0]
        return len(token_ids)


def _misbehave(folder: str) -> None:
    match folder:
        case "missing":
            raise ModelError("missing is no model folder: give one that has a config.json")
        case "broken":
            raise ValueError("cannot read this\nframe 0")
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


def _complain() -> None:
    raise CommunicationError("rank 1 is late")


def _die_later() -> None:
    time.sleep(0.05)
    _die()


def _nothing() -> None:
    return


ORDERS = (_nothing, _spin, _sleep, _raise, _die, _complain, _die_later) + (_nothing,) * 3
NOTHING, SPIN, SLEEP, RAISE, DIE, COMPLAIN, DIE_LATER, READ_WEIGHTS, COUNT_ARENA, AWAIT = range(10)


_MODULE = "tests.multi.fakes"  # also where this file runs as a script

FAKES = Entries(
    describe=f"{_MODULE}:describe",
    describe_shard=f"{_MODULE}:describe_shard",
    load=f"{_MODULE}:load_shard",
    card=f"{_MODULE}:start_on_card",
    store=f"{_MODULE}:serve_store",
    comm=f"{_MODULE}:open_comm",
    runner=f"{_MODULE}:FakeRunner",
    memory=f"{_MODULE}:memory_use",
    preload=(),
)


def replica_spec(
    folder: str = "fake-0", pp_size: int = 1, tp_size: int = 1, dp: int = 0, kind: str = "cpu"
) -> ReplicaSpec:
    """A replica of ``pp_size`` stages of ``tp_size`` ranks; each rank on a device of its own."""
    places = [RankPlace(dp=dp, pp=pp, tp=tp) for pp in range(pp_size) for tp in range(tp_size)]
    workers = tuple(_worker_spec(folder, place, pp_size, tp_size, kind) for place in places)
    return ReplicaSpec(workers, (4096,) * len(workers), SegmentLayout(pp_size, tp_size))


def _worker_spec(
    folder: str, place: RankPlace, pp_size: int, tp_size: int, kind: str
) -> WorkerSpec:
    return WorkerSpec(
        place=place,
        device=DeviceSpec(kind="cuda" if kind == "cuda" else "cpu", index=place.tp),
        shard=ShardSpec(
            folder=folder,
            dtype="float32",
            first_layer=place.pp,
            end_layer=place.pp + 1,
            num_layers=pp_size,
            pp_rank=place.pp,
            pp_size=pp_size,
            tp_rank=place.tp,
            tp_size=tp_size,
        ),
        cache=CacheLayout(block_size=16, groups=()),
        epoch=0,
        max_step_tokens=64,
        max_in_flight=4,
        max_model_len=64,
    )


def supervise(phase: str) -> None:
    """A script that gets as far as ``phase``, says which processes there are, and waits."""
    supervisor = Supervisor(FAKES)
    spec = replica_spec("slow" if phase == "loading" else "fake-0", tp_size=2)
    if phase == "loading":
        shards = [worker.shard for worker in spec.workers]
        threading.Thread(target=supervisor.load, args=[shards], daemon=True).start()
        while len(supervisor.pids()) < 3:
            time.sleep(0.01)
    else:
        supervisor.load([worker.shard for worker in spec.workers])
        executor = LocalProcessExecutor(supervisor.spawn([spec])[0])
        if phase == "stuck":
            executor.submit(plan(0, SPIN))
            executor.wait(0.2)
    print(*supervisor.pids(), flush=True)
    sys.stdin.read()


def plan(step: int, order: int = 0, rank: int = -1, num_tokens: int = 1) -> StepPlan:
    """A plan that orders one rank (-1: all of them) to do something."""
    return StepPlan(0, step, (LanePlan(new=(_order(order, rank, num_tokens),)),))


def plan_of_two(step: int, first: int, second: int) -> StepPlan:
    """A plan with an order for each of the ranks 0 and 1."""
    return StepPlan(0, step, (LanePlan(new=(_order(first, 0), _order(second, 1))),))


def _order(order: int, rank: int, num_tokens: int = 1) -> NewSequence:
    return NewSequence(rank, (order,) * num_tokens, num_tokens, SamplingSpec())


if __name__ == "__main__":
    supervise(sys.argv[1])
