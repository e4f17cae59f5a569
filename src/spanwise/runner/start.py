"""The runner for what a shard is run for."""

from __future__ import annotations

from mmap import mmap
from typing import TYPE_CHECKING

import torch

from spanwise.comm.communicator import RankComm
from spanwise.model.shard import Shard
from spanwise.runner.runner import Runner
from spanwise.types.worker import WorkerSpec

if TYPE_CHECKING:
    from spanwise.model.forward_shard import ForwardShard
    from spanwise.runner.forward import ForwardRunner


def start_runner(
    shard: Shard | ForwardShard,
    spec: WorkerSpec,
    comm: RankComm,
    arena: mmap | memoryview | bytearray | torch.Tensor,
) -> Runner | ForwardRunner:
    """Make one rank ready for steps; an arena on a card says which card it is."""
    if isinstance(shard, Shard):
        return Runner(shard, spec, comm, arena)
    from spanwise.runner.forward import ForwardRunner  # with what takes models apart

    device = arena.device if isinstance(arena, torch.Tensor) else torch.device("cpu")
    return ForwardRunner(shard, spec, comm, device)
