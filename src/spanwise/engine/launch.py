"""From a config to running replicas: describe, lay out, load, size the cache, start workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from spanwise.comm.segment import SegmentLayout
from spanwise.cost.card import card_cache_bytes
from spanwise.cost.memory import CacheWish, RankMemory, arena_bytes, size_cache
from spanwise.device import quantization
from spanwise.device.devices import cuda_cards, host_memory, parse_devices
from spanwise.engine.config import EngineConfig
from spanwise.errors import DeviceError, InputError
from spanwise.layout.layout import plan_layout
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.scheduler import Scheduler
from spanwise.types.cache import CacheLayout
from spanwise.types.model import ModelFacts
from spanwise.types.worker import DeviceSpec, RankPlace, ShardInfo, ShardSpec, WorkerSpec
from spanwise.worker.entries import LoadedShard
from spanwise.worker.executor import Executor
from spanwise.worker.in_process import InProcessExecutor, load_in_process
from spanwise.worker.local import LocalProcessExecutor, RunningReplica
from spanwise.worker.remote_supervisor import RemoteSupervisor
from spanwise.worker.replica import ReplicaSpec
from spanwise.worker.supervisor import Supervisor

Progress = Callable[[str], None]

# Of the memory that is free once weights are loaded, what is left to everything else.
_MARGIN_SHARE = 0.1
_MARGIN_BYTES = 256 << 20
_LINE = 64
_CLOSE_TIMEOUT_S = 5.0


class DeviceUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank takes of its device."""

    place: RankPlace
    device: str
    weight_bytes: int
    cache_bytes: int


class EnginePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided at start: shown to the user, and fixed from then on.

    ``dtype`` names the quantization too: "bfloat16 + int8".
    """

    model: str
    architecture: str
    dtype: str
    layout: str
    max_model_len: int
    cache_tokens: int
    ranks: tuple[DeviceUse, ...]
    idle_devices: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReplicaHandle:
    """One running replica: who plans and who computes."""

    scheduler: Scheduler
    executor: Executor


@dataclass(frozen=True)
class Started:
    """A started engine's parts. ``close`` gives everything back; it may be called again."""

    replicas: tuple[ReplicaHandle, ...]
    scheduling: SchedulerConfig
    facts: ModelFacts
    plan: EnginePlan
    close: Callable[[], None]


def launch(
    config: EngineConfig,
    folder: Path,
    progress: Progress,
    shared: Supervisor | RemoteSupervisor | None = None,
    beside: Callable[[], None] = lambda: None,
) -> Started:
    """Start everything. On failure nothing is left running. Raises InputError or EngineError.

    ``shared``: a supervisor whose fork server and weights other engines use too; it stays.
    ``beside`` is called when the start has become the work of other processes.
    """
    wanted = config.layout.degrees(1)
    devices = parse_devices(config.devices, wanted.dp * wanted.pp * wanted.tp)
    degrees = config.layout.degrees(len(devices))
    if config.quantization is not None:
        quantization.check_devices(config.quantization, devices)
    alone = degrees.dp * degrees.pp * degrees.tp == 1 and devices[0].kind == "cpu"
    if alone and shared is None:
        return _Launch(config, folder, devices, progress, None).run()
    start = _Launch(config, folder, devices, progress, shared or Supervisor(), shared is None)
    try:
        beside()
        return start.run()
    except BaseException:
        start.close()
        raise


class _Launch:
    """One start, step by step, and its undoing."""

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        devices: Sequence[DeviceSpec],
        progress: Progress,
        supervisor: Supervisor | RemoteSupervisor | None,
        owns_supervisor: bool = False,
    ) -> None:
        self.config, self.folder, self.devices = config, folder, devices
        self.progress, self.supervisor = progress, supervisor
        self.owns_supervisor = owns_supervisor
        self.shards: dict[ShardSpec, ShardInfo] = {}
        self.loaded: list[ShardSpec] = []
        self.running: Sequence[RunningReplica] = []
        self.executors: list[Executor] = []
        self._in_process: LoadedShard | None = None

    def run(self) -> Started:
        """Go through the start."""
        self.progress("reading the model's config")
        self.facts = self._describe()
        _check_quantized_dtype(self.config, self.facts)
        self.layout = plan_layout(self.config.layout, self.facts, len(self.devices))
        self.used = tuple(self.devices[: self.layout.num_ranks])
        self.max_step_tokens = max(self.config.max_step_tokens, self.config.max_num_seqs)
        # On a pipeline twice the stages: as many steps on their way to and fro as are computed.
        self.max_in_flight = 2 if self.layout.pp == 1 else 2 * self.layout.pp
        self.progress("loading weights")
        self._load()
        self.max_model_len, self.cache = self._size()
        self.progress("starting workers")
        self._start()
        scheduling = self._scheduler_config()
        schedulers = [Scheduler(scheduling) for _ in self.executors]
        replicas = tuple(map(ReplicaHandle, schedulers, self.executors))
        return Started(replicas, scheduling, self.facts, self._plan(), self.close)

    def close(self) -> None:
        """Give back whatever has been started so far."""
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

    # -- model -----------------------------------------------------------------------------------

    def _describe(self) -> ModelFacts:
        if self.supervisor is not None:
            return self.supervisor.describe(str(self.folder), self.config.dtype)
        from spanwise.model.facts import describe

        return describe(str(self.folder), self.config.dtype)

    def _shard(self, place: RankPlace) -> ShardSpec:
        layers = self.layout.owned_layers(place)
        return ShardSpec(
            folder=str(self.folder),
            dtype=self.config.dtype,
            first_layer=layers.start,
            end_layer=layers.stop,
            num_layers=self.facts.num_layers,
            pp_rank=place.pp,
            pp_size=self.layout.pp,
            tp_rank=place.tp,
            tp_size=self.layout.tp,
            expert_parallel=self.layout.expert_parallel,
            quantization=self.config.quantization,
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

    # -- cache -----------------------------------------------------------------------------------

    def _size(self) -> tuple[int, CacheLayout]:
        """The longest sequence and the cache. Raises DeviceError, or InputError for a wish."""
        longest = self.facts.max_position or 2048
        wanted = self.config.max_model_len
        if wanted is not None and wanted > longest:
            raise InputError(
                f"max_model_len {wanted} is more than the {longest} positions the model was made "
                "for; lower it"
            )
        ranks = self._rank_memory()
        if wanted is not None:
            return wanted, self._cache_for(wanted, ranks)
        try:
            return longest, self._cache_for(longest, ranks)
        except DeviceError:
            fitting = self._longest_fitting(longest, ranks)
            return fitting, self._cache_for(fitting, ranks)

    def _longest_fitting(self, longest: int, ranks: Sequence[RankMemory]) -> int:
        low, high = min(self.config.block_size, longest), longest
        while low < high:
            middle = (low + high + 1) // 2
            try:
                self._cache_for(middle, ranks)
                low = middle
            except DeviceError:
                high = middle - 1
        return low

    def _cache_for(self, max_model_len: int, ranks: Sequence[RankMemory]) -> CacheLayout:
        wish = CacheWish(
            block_size=self.config.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=max_model_len,
            max_step_tokens=self.max_step_tokens,
        )
        return size_cache(self.facts.layer_caches, ranks, wish)

    def _rank_memory(self) -> list[RankMemory]:
        on_host = sum(device.kind == "cpu" for device in self.used)
        host_bytes = self._host_bytes() // max(on_host, 1)
        cards = cuda_cards() if on_host < len(self.used) else []
        memory = []
        for place, device in zip(self.layout.places, self.used, strict=True):
            info = self.shards[self._shard(place)]
            on_card = device.kind == "cuda"
            available = self._card_bytes(device, cards, info) if on_card else host_bytes
            memory.append(
                RankMemory(
                    name=str(device),
                    layer_caches=info.layer_caches,
                    value_bytes=info.value_bytes,
                    available_bytes=available,
                )
            )
        return memory

    def _host_bytes(self) -> int:
        """What all CPU devices may take for their caches together; weights are loaded already."""
        if self.config.kv_cache_memory is not None:
            return self.config.kv_cache_memory
        _, free = host_memory()
        return max(0, int(free * (1 - _MARGIN_SHARE)) - _MARGIN_BYTES)

    def _card_bytes(
        self, device: DeviceSpec, cards: Sequence[tuple[str, int, int]], info: ShardInfo
    ) -> int:
        """What a rank on a card may take for its cache; weights are loaded later."""
        if self.config.kv_cache_memory is not None:
            return self.config.kv_cache_memory // len(self.used)
        _, _, free = cards[device.index]
        return card_cache_bytes(str(device), free, device.share, info.weight_bytes, _MARGIN_SHARE)

    # -- workers ---------------------------------------------------------------------------------

    def _arena_bytes(self, shard: ShardSpec) -> int:
        info = self.shards[shard]
        return arena_bytes(info.layer_caches, info.value_bytes, self.cache)

    def _worker(self, place: RankPlace, device: DeviceSpec) -> WorkerSpec:
        return WorkerSpec(
            place=place,
            device=device,
            shard=self._shard(place),
            cache=self.cache,
            epoch=0,
            max_step_tokens=self.max_step_tokens,
            max_in_flight=self.max_in_flight,
            max_model_len=self.max_model_len,
        )

    def _start(self) -> None:
        workers = [
            self._worker(place, device)
            for place, device in zip(self.layout.places, self.used, strict=True)
        ]
        if self.supervisor is None:
            arena = self._arena_bytes(workers[0].shard)
            assert self._in_process is not None
            self.executors = [InProcessExecutor(self._in_process, workers[0], arena)]
            return
        specs = []
        for replica in range(self.layout.dp):
            own = tuple(worker for worker in workers if worker.place.dp == replica)
            arenas = tuple(self._arena_bytes(worker.shard) for worker in own)
            specs.append(ReplicaSpec(own, arenas, self._segment()))
        self.running = self.supervisor.spawn(specs)
        self.executors = [LocalProcessExecutor(replica) for replica in self.running]

    def _segment(self) -> SegmentLayout:
        """Rings with a slot for every step in flight, wide enough for a whole step's states."""
        hidden_bytes = self.max_step_tokens * self.facts.hidden_size * 4
        token_bytes = self.config.max_num_seqs * 8
        return SegmentLayout(
            self.layout.pp,
            self.layout.tp,
            link_slot_bytes=_round_up(hidden_bytes),
            num_link_slots=self.max_in_flight + 1,
            token_slot_bytes=_round_up(token_bytes),
        )

    def _scheduler_config(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_step_tokens=self.max_step_tokens,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.max_model_len,
            cache=self.cache,
            vocab_size=self.facts.vocab_size,
            num_micro_batches=self.layout.pp,
            max_in_flight=self.max_in_flight,
            recompute_lengths=self.facts.recompute_lengths,
            prefix_caching=self.config.prefix_caching,
            batching=self.config.batching,
            batch_size=self.config.batch_size,
            batch_window_s=self.config.batch_window_s,
        )

    def _numbers(self) -> str:
        rounded = self.config.quantization
        return self.facts.dtype + (f" + {rounded}" if rounded else "")

    def _plan(self) -> EnginePlan:
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
        kept = [group.num_blocks for group in self.cache.groups if not group.window]
        blocks = min(kept or [group.num_blocks for group in self.cache.groups])
        whole = {part for info in self.shards.values() for part in info.replicated}
        return EnginePlan(
            model=self.config.model,
            architecture=self.facts.architecture,
            dtype=self._numbers(),
            layout=self.layout.describe(),
            max_model_len=self.max_model_len,
            cache_tokens=blocks * self.cache.block_size,
            ranks=tuple(ranks),
            idle_devices=tuple(str(self.devices[i]) for i in self.layout.idle_devices),
            replicated=tuple(sorted(whole)),
        )


def _check_quantized_dtype(config: EngineConfig, facts: ModelFacts) -> None:
    if config.quantization is None:
        return
    known = quantization.DTYPES[config.quantization]
    if facts.dtype not in known:
        raise InputError(
            f"quantization {config.quantization} computes in {' or '.join(known)}, not "
            f"in {facts.dtype}; use --dtype bfloat16"
        )


def _round_up(num_bytes: int) -> int:
    return max(1, -(-num_bytes // _LINE)) * _LINE
