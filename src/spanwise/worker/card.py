"""What a worker on a card does that others leave to their zygote. Imports torch."""

from __future__ import annotations

import torch

from spanwise.device.memory import allocate_arena, place, synchronize
from spanwise.model.load import load_shard
from spanwise.types.worker import WorkerSpec
from spanwise.worker.entries import LoadedShard


def start_on_card(spec: WorkerSpec, arena_bytes: int) -> tuple[LoadedShard, torch.Tensor]:
    """Take the card, load the shard there, and make its arena. Raises DeviceError, ModelError."""
    device = place(spec.device)
    shard = load_shard(spec.shard, device)
    arena = allocate_arena(device, arena_bytes)
    synchronize(device)  # an error of the card belongs here, not into the first step
    return shard, arena
