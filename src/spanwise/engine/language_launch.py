"""The start of an engine that generates: its cache is sized, and its tokens are scheduled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spanwise.cost.card import card_cache_bytes
from spanwise.cost.memory import CacheWish, RankMemory, size_cache
from spanwise.device import quantization
from spanwise.device.devices import cuda_cards, host_memory
from spanwise.engine.config import EngineConfig
from spanwise.engine.launch import (
    AnySupervisor,
    EnginePlan,
    Launch,
    Limits,
    Progress,
    ReplicaHandle,
    Wish,
    devices_for,
)
from spanwise.errors import DeviceError, InputError
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.types.cache import CacheLayout
from spanwise.types.model import ModelFacts, ModelSource
from spanwise.types.worker import DeviceSpec, ShardInfo

# Of the memory that is free once weights are loaded, what is left to everything else.
_MARGIN_SHARE = 0.1
_MARGIN_BYTES = 256 << 20

LanguageReplica = ReplicaHandle[SequenceRequest]


@dataclass(frozen=True)
class Started:
    """A started engine's parts. ``close`` gives everything back; it may be called again."""

    replicas: tuple[LanguageReplica, ...]
    scheduling: SchedulerConfig
    facts: ModelFacts
    plan: EnginePlan
    close: Callable[[], None]


def launch(
    config: EngineConfig,
    folder: Path,
    progress: Progress,
    shared: AnySupervisor | None = None,
    beside: Callable[[], None] = lambda: None,
) -> Started:
    """Start everything. On failure nothing is left running. Raises InputError or EngineError.

    ``shared``: a supervisor whose fork server and weights other engines use too; it stays.
    ``beside`` is called when the start has become the work of other processes.
    """
    devices = devices_for(config.devices, config.layout)
    if config.quantization is not None:
        quantization.check_devices(config.quantization, devices)
    wish = Wish(
        name=config.model,
        source=ModelSource(folder=str(folder), dtype=config.dtype),
        devices=devices,
        layout=config.layout,
        quantization=config.quantization,
    )
    start = LanguageLaunch(config, wish, progress, shared)
    replicas = start.run(beside)
    return Started(replicas, start.scheduling, start.facts, start.language_plan(), start.close)


class LanguageLaunch(Launch[SequenceRequest]):
    """One start of a model that generates."""

    max_model_len: int

    def __init__(
        self,
        config: EngineConfig,
        wish: Wish,
        progress: Progress,
        shared: AnySupervisor | None = None,
    ) -> None:
        super().__init__(wish, progress, shared)
        self.config = config
        self.max_step_tokens = max(config.max_step_tokens, config.max_num_seqs)

    @property
    def scheduling(self) -> SchedulerConfig:
        """What the scheduler of a replica may spend."""
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

    def language_plan(self) -> EnginePlan:
        """What was decided, with the cache."""
        kept = [group.num_blocks for group in self.cache.groups if not group.window]
        blocks = min(kept or [group.num_blocks for group in self.cache.groups])
        tokens = blocks * self.cache.block_size
        return self.plan(max_model_len=self.max_model_len, cache_tokens=tokens)

    def _check(self) -> None:
        if self.config.quantization is None:
            return
        known = quantization.DTYPES[self.config.quantization]
        if self.facts.dtype not in known:
            raise InputError(
                f"quantization {self.config.quantization} computes in {' or '.join(known)}, not "
                f"in {self.facts.dtype}; use --dtype bfloat16"
            )

    def _policy(self) -> Scheduler:
        return Scheduler(self.scheduling)

    def _limits(self) -> Limits:
        """Links have a slot for every step in flight, wide enough for a whole step's states."""
        return Limits(
            max_step_tokens=self.max_step_tokens,
            max_model_len=self.max_model_len,
            link_bytes=self.max_step_tokens * self.facts.hidden_size * 4,
            token_bytes=self.config.max_num_seqs * 8,
        )

    # -- cache -----------------------------------------------------------------------------------

    def _size(self) -> CacheLayout:
        """The cache, for the longest sequence that is wanted or fits."""
        longest = self.facts.max_position or 2048
        wanted = self.config.max_model_len
        if wanted is not None and wanted > longest:
            raise InputError(
                f"max_model_len {wanted} is more than the {longest} positions the model was made "
                "for; lower it"
            )
        ranks = self._rank_memory()
        if wanted is not None:
            self.max_model_len = wanted
            return self._cache_for(wanted, ranks)
        self.max_model_len = longest
        try:
            return self._cache_for(longest, ranks)
        except DeviceError:
            self.max_model_len = self._longest_fitting(longest, ranks)
            return self._cache_for(self.max_model_len, ranks)

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
