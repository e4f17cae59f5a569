"""From a config to running replicas: describe, lay out, load, start workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import msgspec

from spanwise.comm.segment import LINE_BYTES, SegmentLayout
from spanwise.cost.memory import arena_bytes
from spanwise.device.devices import parse_devices
from spanwise.layout.layout import Layout, plan_layout
from spanwise.layout.request import LayoutRequest
from spanwise.scheduler.policy import Policy, RequestType
from spanwise.types.cache import CacheLayout
from spanwise.types.model import ModelFacts, ModelSource
from spanwise.types.worker import (
    DeviceSpec,
    Quantization,
    RankPlace,
    ShardInfo,
    ShardSpec,
    WorkerSpec,
)
from spanwise.worker.entries import LoadedShard
from spanwise.worker.executor import Executor
from spanwise.worker.in_process import InProcessExecutor, load_in_process
from spanwise.worker.local import LocalProcessExecutor, RunningReplica
from spanwise.worker.remote_supervisor import RemoteSupervisor
from spanwise.worker.replica import ReplicaSpec
from spanwise.worker.supervisor import Supervisor

Progress = Callable[[str], None]
AnySupervisor = Supervisor | RemoteSupervisor

_CLOSE_TIMEOUT_S = 5.0


class DeviceUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank takes of its device."""

    place: RankPlace
    device: str
    weight_bytes: int
    cache_bytes: int


class EnginePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided at start: shown to the user, and fixed from then on.

    ``dtype`` names the quantization too: "bfloat16 + int8". ``max_model_len`` and ``cache_tokens``
    are 0 where nothing is cached.
    """

    model: str
    architecture: str
    dtype: str
    layout: str
    ranks: tuple[DeviceUse, ...]
    max_model_len: int = 0
    cache_tokens: int = 0
    idle_devices: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReplicaHandle(Generic[RequestType]):
    """One running replica: who plans and who computes."""

    scheduler: Policy[RequestType]
    executor: Executor


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What steps are bounded by.

    ``link_bytes`` go from stage to stage in a step, ``token_bytes`` from the last to the first.
    """

    max_step_tokens: int
    max_model_len: int
    link_bytes: int
    token_bytes: int


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be started where; ``name`` is what the user calls the model."""

    name: str
    source: ModelSource
    devices: tuple[DeviceSpec, ...]
    layout: LayoutRequest
    quantization: Quantization | None = None

    @property
    def fits_this_process(self) -> bool:
        """Whether it is one CPU device alone."""
        num_ranks = self.layout.degrees(len(self.devices)).num_ranks
        return num_ranks == 1 and self.devices[0].kind == "cpu"


def devices_for(devices: str | None, layout: LayoutRequest) -> tuple[DeviceSpec, ...]:
    """The devices asked for, as many as the layout needs where that is open. Raises DeviceError."""
    return parse_devices(devices, layout.degrees(1).num_ranks)


class Launch(ABC, Generic[RequestType]):
    """One start, step by step, and its undoing. What is run decides what is cached, and who plans.

    Without a supervisor everything is done in this process. One that is ``shared`` keeps its fork
    server, and the weights that others use too.
    """

    facts: ModelFacts
    layout: Layout
    used: tuple[DeviceSpec, ...]
    cache: CacheLayout

    def __init__(self, wish: Wish, progress: Progress, shared: AnySupervisor | None = None) -> None:
        self.wish, self.progress = wish, progress
        self.owns_supervisor = shared is None and not wish.fits_this_process
        self.supervisor = Supervisor() if self.owns_supervisor else shared
        self.shards: dict[ShardSpec, ShardInfo] = {}
        self.loaded: list[ShardSpec] = []
        self.running: Sequence[RunningReplica] = []
        self.executors: list[Executor] = []
        self._in_process: LoadedShard | None = None

    def run(
        self, beside: Callable[[], None] = lambda: None
    ) -> tuple[ReplicaHandle[RequestType], ...]:
        """Start everything; on failure nothing is left running. Raises InputError or EngineError.

        ``beside`` is called when the start has become the work of other processes.
        """
        try:
            if self.supervisor is not None:
                beside()
            self._go()
        except BaseException:
            self.close()
            raise
        return tuple(ReplicaHandle(self._policy(), executor) for executor in self.executors)

    def close(self) -> None:
        """Give back whatever has been started so far. May be called again."""
        for executor in self.executors:
            executor.close()
        if self.supervisor is not None:
            for replica in self.running:
                replica.close(_CLOSE_TIMEOUT_S)
            if self.owns_supervisor:
                assert isinstance(self.supervisor, Supervisor)
                self.supervisor.shutdown()
            else:
                self.supervisor.unload(self.loaded)
        self.executors, self.running, self.loaded = [], [], []
        self._in_process = None

    @property
    def max_in_flight(self) -> int:
        """On a pipeline twice the stages: as many steps on their way to and fro as are computed."""
        return 2 * self.layout.pp

    def plan(self, **limits: int) -> EnginePlan:
        """What was decided."""
        ranks = []
        for place, device in zip(self.layout.places, self.used, strict=True):
            shard = self._shard(place)
            ranks.append(
                DeviceUse(
                    place=place,
                    device=str(device),
                    weight_bytes=self.shards[shard].weight_bytes,
                    cache_bytes=self._arena_bytes(shard),
                )
            )
        whole = {part for info in self.shards.values() for part in info.replicated}
        rounded = self.wish.quantization
        return EnginePlan(
            model=self.wish.name,
            architecture=self.facts.architecture,
            dtype=self.facts.dtype + (f" + {rounded}" if rounded else ""),
            layout=self.layout.describe(),
            ranks=tuple(ranks),
            idle_devices=tuple(str(self.wish.devices[i]) for i in self.layout.idle_devices),
            replicated=tuple(sorted(whole)),
            **limits,
        )

    # -- what is run decides ---------------------------------------------------------------------

    def _check(self) -> None:
        """Raise InputError for what the facts do not allow."""
        return None

    @abstractmethod
    def _size(self) -> CacheLayout:
        """How large the cache is. Raises DeviceError, or InputError for a wish."""

    @abstractmethod
    def _policy(self) -> Policy[RequestType]:
        """Who plans the steps of one replica."""

    @abstractmethod
    def _limits(self) -> Limits:
        """What steps are bounded by."""

    # -- model -----------------------------------------------------------------------------------

    def _go(self) -> None:
        self.progress("reading the model's config")
        self.facts = self._describe()
        self._check()
        self.layout = plan_layout(self.wish.layout, self.facts, len(self.wish.devices))
        self.used = tuple(self.wish.devices[: self.layout.num_ranks])
        self.progress("loading weights")
        self._load()
        self.cache = self._size()
        self.progress("starting workers")
        self._start()

    def _describe(self) -> ModelFacts:
        if self.supervisor is not None:
            return self.supervisor.describe(self.wish.source)
        from spanwise.model.load import describe

        return describe(self.wish.source)

    def _shard(self, place: RankPlace) -> ShardSpec:
        layers, source = self.layout.owned_layers(place), self.wish.source
        return ShardSpec(
            folder=source.folder,
            dtype=source.dtype,
            first_layer=layers.start,
            end_layer=layers.stop,
            num_layers=self.facts.num_layers,
            pp_rank=place.pp,
            pp_size=self.layout.pp,
            tp_rank=place.tp,
            tp_size=self.layout.tp,
            expert_parallel=self.layout.expert_parallel,
            quantization=self.wish.quantization,
            task=source.task,
            example=source.example,
        )

    def _load(self) -> None:
        """Load every distinct shard; for cards only say what it holds, their workers load it."""
        specs = list(dict.fromkeys(self._shard(place) for place in self.layout.places))
        if self.supervisor is None:
            shard = load_in_process(specs[0])
            self._in_process, infos = shard, [shard.info()]
        elif self.used[0].kind == "cuda":
            infos = self.supervisor.describe_shards(specs)
        else:
            infos = self.supervisor.load(
                specs, lambda loaded, of: self.progress(f"loaded {loaded} of {of} shards")
            )
            self.loaded = specs
        self.shards = dict(zip(specs, infos, strict=True))

    # -- workers ---------------------------------------------------------------------------------

    def _arena_bytes(self, shard: ShardSpec) -> int:
        info = self.shards[shard]
        return arena_bytes(info.layer_caches, info.value_bytes, self.cache)

    def _worker(self, place: RankPlace, device: DeviceSpec, limits: Limits) -> WorkerSpec:
        return WorkerSpec(
            place=place,
            device=device,
            shard=self._shard(place),
            cache=self.cache,
            epoch=0,
            max_step_tokens=limits.max_step_tokens,
            max_in_flight=self.max_in_flight,
            max_model_len=limits.max_model_len,
        )

    def _start(self) -> None:
        limits = self._limits()
        workers = [
            self._worker(place, device, limits)
            for place, device in zip(self.layout.places, self.used, strict=True)
        ]
        if self.supervisor is None:
            arena = self._arena_bytes(workers[0].shard)
            assert self._in_process is not None
            self.executors = [InProcessExecutor(self._in_process, workers[0], arena)]
            return
        segment = SegmentLayout(
            self.layout.pp,
            self.layout.tp,
            link_slot_bytes=_round_up(limits.link_bytes),
            num_link_slots=self.max_in_flight + 1,
            token_slot_bytes=_round_up(limits.token_bytes),
        )
        specs = []
        for replica in range(self.layout.dp):
            own = tuple(worker for worker in workers if worker.place.dp == replica)
            arenas = tuple(self._arena_bytes(worker.shard) for worker in own)
            specs.append(ReplicaSpec(own, arenas, segment))
        self.running = self.supervisor.spawn(specs)
        self.executors = [LocalProcessExecutor(replica) for replica in self.running]


def _round_up(num_bytes: int) -> int:
    return max(1, -(-num_bytes // LINE_BYTES)) * LINE_BYTES
