"""What a worker is told about its place, its shard and its device."""

from __future__ import annotations

from typing import Literal

import msgspec

from spanwise.types.cache import CacheLayout, LayerCache
from spanwise.types.forward import TensorData

Quantization = Literal["int8", "fp8"]
ModelTask = Literal["generate", "forward"]
"""What a model is run for: tokens, one after the other, or one forward an item."""


class DeviceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One device of one worker.

    ``cpu``: ``cores`` are the CPU ids it may run on (several devices may name the same ones) and
    ``threads`` how many it computes with. ``cuda``: ``index`` is the card and ``share`` how many
    ranks use that card.
    """

    kind: Literal["cpu", "cuda"]
    index: int = 0
    cores: tuple[int, ...] = ()
    threads: int = 1
    share: int = 1

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"


class RankPlace(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """Where a rank stands: ``dp`` replica, ``pp`` stage, ``lane``, ``tp`` rank; each from 0."""

    dp: int = 0
    pp: int = 0
    lane: int = 0
    tp: int = 0


class ShardSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of which model a rank holds; equal for the same rank of every replica.

    The rank owns the decoder layers ``first_layer`` to ``end_layer`` (exclusive), of which it holds
    the ``tp_rank``-th of ``tp_size`` shares; ``expert_parallel`` gives whole experts instead of
    slices of each. ``dtype`` is a torch name ("float32"); ``quantization`` says how the linears of
    the layers are stored and multiplied instead, None as they are.

    Of a model that is run by one ``forward`` the layers are the pieces it comes apart into when it
    is run on the ``example``, one item's inputs; ``folder`` may be a ``module:factory`` then.
    """

    folder: str
    dtype: str
    first_layer: int
    end_layer: int
    num_layers: int
    pp_rank: int = 0
    pp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    expert_parallel: bool = False
    quantization: Quantization | None = None
    task: ModelTask = "generate"
    example: tuple[TensorData, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether the rank's stage takes token ids."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether the rank's stage gives logits."""
        return self.pp_rank == self.pp_size - 1


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker needs beside its shard: place, device, cache, epoch, limits.

    ``max_step_tokens`` bounds the tokens of one step plan (it sizes the hand-over buffers),
    ``max_in_flight`` the plans sent whose results have not come. ``store_port``: where the ranks
    meet to join over NCCL, a port of 127.0.0.1; 0 where they are joined by shared memory.
    """

    place: RankPlace
    device: DeviceSpec
    shard: ShardSpec
    cache: CacheLayout
    epoch: int
    max_step_tokens: int
    max_in_flight: int
    max_model_len: int
    store_port: int = 0


class DeviceReading(msgspec.Struct, frozen=True, array_like=True):
    """A rank's device at one moment, as its worker sees it between two steps.

    ``busy_s``: the time it has spent in steps so far, waits for other ranks included. ``at_s`` is
    on the worker's monotonic clock: two readings give a share. Memory is what this process holds:
    on a CPU all that is resident, pages shared with other processes included, of the host's; on a
    card what is allocated there, of the card's.
    """

    busy_s: float
    at_s: float
    memory_used_bytes: int
    memory_total_bytes: int


class ShardInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded shard holds: weights, and what each owned layer caches on this rank.

    ``value_bytes`` is the size of one cached value, ``replicated`` what stayed whole.
    """

    weight_bytes: int
    value_bytes: int
    hidden_size: int
    layer_caches: dict[int, LayerCache]
    replicated: tuple[str, ...] = ()
