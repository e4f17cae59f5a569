"""NCCL between the cards there are, and two ranks on one card without it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spanwise.comm.nccl import NcclGroups, connect_store, serve_store
from spanwise.comm.segment import SegmentLayout, create_segment
from spanwise.comm.shared_memory import open_rank_comm
from spanwise.comm.store import listen_on_loopback
from spanwise.errors import CommunicationError, WaitInterruptedError

pytestmark = pytest.mark.gpu


def drawn(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sum_in_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


# --- what each rank's process runs --------------------------------------------------------------


def check_collectives(rank: int, size: int, port: int) -> None:
    groups = groups_of(rank, size, port, tp_size=size)
    sizes = [3, 0, 130, 7, 1, 2, 5, 4][:size]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((), (7,), (3, 40), (0,), (700, 301)):
            parts = [drawn(shape, dtype, seed) for seed in range(size)]
            got = groups.comm.tp.all_reduce(parts[rank].cuda(rank))
            assert torch.equal(got.cpu(), sum_in_order(parts)), (dtype, shape)
        for dim in (0, 1):
            parts = [drawn((n, 5) if dim == 0 else (5, n), dtype, n) for n in sizes]
            got = groups.comm.tp.all_gather(parts[rank].cuda(rank), sizes, dim)
            assert torch.equal(got.cpu(), torch.cat(parts, dim)), (dtype, dim)
    groups.comm.tp.barrier()
    groups.abort(30.0)


def check_links(rank: int, size: int, port: int) -> None:
    groups = groups_of(rank, size, port, pp_size=size)
    comm = groups.comm
    for number in range(50):
        tensor = torch.full((1 + number * 97, 3), float(number), device=f"cuda:{rank}")
        if comm.inbox is not None:
            comm.inbox.recv(tensor.zero_())
        if comm.outbox is not None:
            comm.outbox.send(tensor + 1)
        elif comm.tokens is not None:
            comm.tokens.send(tensor[:1, 0].long())
        if rank == 0 and comm.tokens is not None:
            token = comm.tokens.recv(torch.empty(1, dtype=torch.int64, device="cuda:0"))
            assert token.item() == number + size - 1
    torch.cuda.synchronize(rank)
    groups.abort(30.0)


def check_abort(rank: int, size: int, port: int) -> None:
    """Rank 0 never comes; the others' wait is ended from another thread."""
    groups = groups_of(rank, size, port, tp_size=size)
    if rank == 0:
        if size > 1:
            connect_store(port).wait(["others ended"])
        return groups.abort(20.0)
    timer = threading.Timer(2.0, groups.abort, (20.0,))
    timer.start()
    # NCCL may end the wait of the first barrier without an error; the second cannot start.
    with pytest.raises(WaitInterruptedError):
        groups.comm.tp.barrier()
        groups.comm.tp.barrier()
    timer.join()
    connect_store(port).set("others ended", "")


def check_one_card_twice(rank: int, size: int, port: int) -> None:
    with pytest.raises(CommunicationError, match="two ranks on one card need shared memory"):
        groups_of(rank, size, port, tp_size=size, card=0)


def groups_of(
    rank: int, size: int, port: int, *, tp_size: int = 1, pp_size: int = 1, card: int | None = None
) -> NcclGroups:
    assert tp_size * pp_size == size
    device = torch.device("cuda", rank if card is None else card)
    torch.cuda.set_device(device)
    stage, tp_rank = divmod(rank, tp_size)
    return NcclGroups(
        connect_store(port),
        name="replica 0 epoch 1",
        pp_size=pp_size,
        tp_size=tp_size,
        pp_rank=stage,
        tp_rank=tp_rank,
        device=device,
        timeout_s=60.0,
    )


# --- the tests ----------------------------------------------------------------------------------


def run_ranks(check: Callable[[int, int, int], None], size: int) -> None:
    """Run a check in a fresh process for each rank; a fork could not use CUDA."""
    listener = listen_on_loopback()
    port = listener.getsockname()[1]
    store = serve_store(listener)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, check.__name__, str(rank), str(size), str(port)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        reports = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert store.port == port
    assert [process.returncode for process in processes] == [0] * size, "\n".join(reports)


@pytest.mark.parametrize("check", [check_collectives, check_links, check_abort])
def test_between_cards(check: Callable[[int, int, int], None]) -> None:
    """With one card there are no groups to make, and the same calls go through."""
    run_ranks(check, torch.cuda.device_count())


def test_nccl_refuses_two_ranks_on_one_card_in_words() -> None:
    run_ranks(check_one_card_twice, 2)


def test_two_ranks_on_one_card_are_staged_through_shared_memory() -> None:
    parts = [drawn((33, 70), torch.bfloat16, seed) for seed in range(2)]
    layout = SegmentLayout(2, 2, slot_bytes=1024, link_slot_bytes=1024)
    fd = create_segment("test", layout)

    def body(stage: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        comm = open_rank_comm(fd, stage, rank, spin_s=0, timeout_s=30)
        total = comm.tp.all_reduce(parts[rank].cuda())
        joined = comm.tp.all_gather(parts[rank].cuda(), [70, 70])
        passed = torch.zeros(33, 70, dtype=torch.bfloat16, device="cuda")
        if comm.outbox is not None:
            comm.outbox.send(total)
        if comm.inbox is not None:
            comm.inbox.recv(passed)
        return total.cpu(), joined.cpu(), passed.cpu()

    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(body, (0, 0, 1, 1), (0, 1, 0, 1)))
    finally:
        os.close(fd)
    for stage, (total, joined, passed) in zip((0, 0, 1, 1), results, strict=True):
        assert torch.equal(total, sum_in_order(parts))
        assert torch.equal(joined, torch.cat(parts, -1))
        assert torch.equal(passed, total * stage)


if __name__ == "__main__":
    checks = (check_collectives, check_links, check_abort, check_one_card_twice)
    chosen = next(check for check in checks if check.__name__ == sys.argv[1])
    chosen(*(int(word) for word in sys.argv[2:5]))
