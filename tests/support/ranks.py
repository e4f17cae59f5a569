"""Ranks of a small layout as threads, and what their collectives must give."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from spanwise.comm.communicator import Communicator, RankComm
from spanwise.comm.process_group import GroupCommunicator, Operations
from spanwise.comm.segment import SegmentLayout, create_segment, interrupt
from spanwise.comm.shared_memory import open_rank_comm
from spanwise.errors import WaitInterruptedError

T = TypeVar("T")


def small(pp_size: int, tp_size: int) -> SegmentLayout:
    """Slots so small that most tensors travel in pieces."""
    return SegmentLayout(
        pp_size, tp_size, slot_bytes=256, link_slot_bytes=128, num_link_slots=3, token_slot_bytes=64
    )


@contextmanager
def segment(layout: SegmentLayout) -> Iterator[int]:
    fd = create_segment("test", layout)
    try:
        yield fd
    finally:
        os.close(fd)


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run each call in a thread of its own; the results in order, or the first error."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, WaitInterruptedError)):
        raise error
    return [future.result() for future in futures]


def on_ranks(layout: SegmentLayout, body: Callable[[RankComm, int], T]) -> list[T]:
    """``body(channels, rank)`` on every rank of a layout at once, stage by stage."""
    with segment(layout) as fd:

        def call(rank: int) -> T:
            place = divmod(rank, layout.tp_size)
            try:
                return body(open_rank_comm(fd, *place, spin_s=0, timeout_s=30), rank)
            except BaseException:
                interrupt(fd)  # a failed check must not leave the others waiting
                raise

        ranks = range(layout.pp_size * layout.tp_size)
        return together([lambda rank=rank: call(rank) for rank in ranks])


def shared_memory(size: int, body: Callable[[Communicator], object]) -> list[object]:
    return on_ranks(small(1, size), lambda comm, rank: body(comm.tp))


def process_group(size: int, body: Callable[[Communicator], object]) -> list[object]:
    """The code that runs over NCCL on cards, over gloo here."""
    store = dist.HashStore()

    def call(rank: int) -> object:
        backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30))
        operations = Operations(backend, f"rank {rank}", threading.Event())
        return body(GroupCommunicator(operations, rank, size))

    return together([lambda rank=rank: call(rank) for rank in range(size)])


Run = Callable[[int, Callable[[Communicator], object]], list[object]]
BACKENDS: list[Run] = [shared_memory, process_group]


def drawn(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 3).to(dtype)
    return torch.randint(-9, 9, shape, generator=generator).to(dtype)


def expected_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """In rank order; half precision is summed in float32 and rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(dtype)
