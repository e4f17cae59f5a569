"""The CPU in the place of cards, for workers that are told they have one."""

from __future__ import annotations

import msgspec
import torch

from spanwise.comm.communicator import RankComm
from spanwise.model.shard import Shard
from spanwise.types.worker import DeviceSpec, WorkerSpec
from spanwise.worker.card import start_on_card
from spanwise.worker.entries import Entries
from spanwise.worker.rank_comm import open_comm

_CPU = DeviceSpec(kind="cpu")


def start(spec: WorkerSpec, arena_bytes: int) -> tuple[Shard, torch.Tensor]:
    """As on a card, with the arena a tensor."""
    assert spec.device.kind == "cuda"
    return start_on_card(msgspec.structs.replace(spec, device=_CPU), arena_bytes)


def join(segment_fd: int, spec: WorkerSpec, may_spin: bool) -> RankComm:
    """Over the segment, also where cards would have been joined by NCCL."""
    return open_comm(segment_fd, msgspec.structs.replace(spec, store_port=0), may_spin)


CPU_CARDS = Entries(card=f"{__name__}:start", comm=f"{__name__}:join")
