"""Links, the ranks being threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import drawn, on_ranks, small, together

from spanwise.comm.communicator import Link, RankComm
from spanwise.comm.process_group import GroupLink, Operations


def ring_pair(body: Callable[[Link, bool], object]) -> list[object]:
    def call(comm: RankComm, rank: int) -> object:
        link = comm.outbox if rank == 0 else comm.inbox
        assert link is not None
        return body(link, rank == 0)

    return on_ranks(small(2, 1), call)


def group_pair(body: Callable[[Link, bool], object]) -> list[object]:
    store = dist.HashStore()

    def call(rank: int) -> object:
        backend = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))
        link = GroupLink(Operations(backend, f"rank {rank}", threading.Event()))
        result = body(link, rank == 0)
        backend.barrier().wait()  # a sender that goes closes the connection
        return result

    return together([lambda: call(0), lambda: call(1)])


@pytest.mark.parametrize("pair", [ring_pair, group_pair])
def test_a_link_keeps_order_and_bytes_whatever_the_size(
    pair: Callable[[Callable[[Link, bool], object]], list[object]],
) -> None:
    shapes = [(), (1,), (3, 5), (0,), (16,), (33,), (7, 41), (2, 0), (200,)] * 6
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    cases = [(dtypes[n % 3], shape, n) for n, shape in enumerate(shapes)]

    def body(link: Link, sends: bool) -> object:
        if sends:
            for dtype, shape, seed in cases:
                tensor = drawn(shape, dtype, seed)
                link.send(tensor)
                tensor.zero_()  # it was copied
            link.send(drawn((31, 20), torch.float32, 1).t())
            link.send(drawn((3, 2), torch.float32, 2).t())
            return None
        for dtype, shape, seed in cases:
            out = torch.empty(shape, dtype=dtype)
            assert link.recv(out) is out
            assert torch.equal(out, drawn(shape, dtype, seed)), (dtype, shape)
        large, little = torch.empty(31, 20).t(), torch.empty(3, 2).t()
        assert torch.equal(link.recv(large), drawn((31, 20), torch.float32, 1).t())
        assert torch.equal(link.recv(little), drawn((3, 2), torch.float32, 2).t())
        return None

    pair(body)


def test_a_sender_waits_only_while_the_ring_is_full() -> None:
    sent = 0
    may_read = threading.Event()

    def body(link: Link, sends: bool) -> None:
        nonlocal sent
        if sends:
            for number in range(5):
                link.send(torch.tensor([number]))
                sent += 1
                if sent == 3:
                    may_read.set()
            return
        assert may_read.wait(10), "three fit without a reader"
        time.sleep(0.05)  # time in which a fourth could wrongly be sent
        assert sent == 3
        assert [link.recv(torch.empty(1, dtype=torch.int64)).item() for _ in range(5)] == [
            *range(5)
        ]

    ring_pair(body)
