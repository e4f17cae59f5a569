"""All channels of a rank through shared memory, the ranks being threads."""

from __future__ import annotations

import random
import time

import pytest
import torch
from tests.support.ranks import on_ranks, segment, shared_memory, small

from spanwise.comm.communicator import Communicator, RankComm
from spanwise.comm.shared_memory import SharedMemoryCommunicator, open_rank_comm, tiles
from spanwise.comm.slots import SHAPES_REMEMBERED


def test_operations_check_what_they_are_given() -> None:
    def body(comm: Communicator) -> None:
        for sizes in ([[1, 2], [1, 2]], [[2], [2]], [[1, 0, 1]] * 2, [[1, 1]] * 3):
            with pytest.raises(AssertionError):
                comm.all_to_all(torch.ones(2, 3), sizes)
        with pytest.raises(AssertionError):
            comm.all_gather(torch.ones(2, 3), [2, 2])
        with pytest.raises(AssertionError):
            comm.all_gather(torch.ones(2, 3), [3, 3, 3])

    shared_memory(2, body)


def test_slots_made_in_inference_mode_serve_outside_of_it() -> None:
    def body(comm: Communicator) -> torch.Tensor:
        with torch.inference_mode():
            comm.all_reduce(torch.ones(5))
        return comm.all_reduce(torch.ones(5))

    for result in shared_memory(2, body):
        assert torch.equal(result, torch.full((5,), 2.0))


def test_interleaved_operations_under_random_delays() -> None:
    """Thousands of operations of all kinds; ranks drift apart and meet."""
    rounds = 600

    def body(comm: RankComm, rank: int) -> int:
        stage, tp_rank = divmod(rank, 2)
        delays = random.Random(rank)
        for number in range(rounds):
            if delays.random() < 0.02:
                time.sleep(delays.random() * 0.002)
            total = comm.tp.all_reduce(torch.full((1 + number % 90,), number + tp_rank))
            assert torch.equal(total, torch.full_like(total, 2 * number + 1))
            sizes = [number % 3, (number + 1) % 2]
            got = comm.tp.all_gather(torch.full((2, sizes[tp_rank]), tp_rank), sizes)
            assert got.tolist() == [[0] * sizes[0] + [1] * sizes[1]] * 2
            rows = [[number % 5, number % 2], [1, (number * 11) % 40]]
            got = comm.tp.all_to_all(torch.full((sum(rows[tp_rank]), 3), tp_rank), rows)
            assert got.tolist() == [
                [source] * 3 for source in (0, 1) for _ in range(rows[source][tp_rank])
            ]
            if number % 7 == 0:
                comm.tp.barrier()
            _pass_on(comm, stage, number)
        return rank

    assert on_ranks(small(3, 2), body) == list(range(6))


def _pass_on(comm: RankComm, stage: int, number: int) -> None:
    """A tensor through the stages, its sum back from the last to the first one round later."""
    size = 1 + (number * 37) % 150
    if comm.inbox is None:
        tensor = torch.full((size,), number)
    else:
        tensor = comm.inbox.recv(torch.empty(size, dtype=torch.int64))
        assert tensor.unique().tolist() == [number * 10 ** (stage - 1) if stage else number]
    if comm.outbox is not None:
        comm.outbox.send(tensor * (10 if stage else 1))
    elif comm.tokens is not None:
        comm.tokens.send(tensor.sum().view(1))
    if comm.inbox is None and comm.tokens is not None and number > 0:
        before = number - 1
        token = comm.tokens.recv(torch.empty(1, dtype=torch.int64))
        assert token.item() == before * 10 * (1 + (before * 37) % 150)


@pytest.mark.parametrize(("pp_size", "tp_size"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_each_rank_has_the_channels_of_its_place(pp_size: int, tp_size: int) -> None:
    with segment(small(pp_size, tp_size)) as fd:
        for stage in range(pp_size):
            for tp_rank in range(tp_size):
                comm = open_rank_comm(fd, stage, tp_rank)
                assert (comm.tp.rank, comm.tp.size) == (tp_rank, tp_size)
                assert (comm.inbox is not None) == (stage > 0)
                assert (comm.outbox is not None) == (stage < pp_size - 1)
                assert (comm.tokens is not None) == (pp_size > 1 and stage in (0, pp_size - 1))


@pytest.mark.parametrize(
    ("rows", "columns", "capacity"), [(1, 1, 1), (5, 3, 7), (5, 3, 2), (2, 100, 33), (9, 4, 1000)]
)
def test_tiles_cover_a_matrix_once_and_fit(rows: int, columns: int, capacity: int) -> None:
    seen = torch.zeros(rows, columns, dtype=torch.int64)
    for tile in tiles(rows, columns, capacity):
        part = tile.of(seen)
        assert 0 < part.numel() <= capacity
        part += 1
    assert seen.eq(1).all()


def test_more_shapes_than_are_remembered() -> None:
    def body(comm: Communicator) -> None:
        for _ in range(2):
            for entries in range(2 * SHAPES_REMEMBERED):
                total = comm.all_reduce(torch.full((entries,), float(entries)))
                assert torch.equal(total, torch.full((entries,), 3.0 * entries))
                sizes = [entries, 0, 1]
                joined = comm.all_gather(torch.full((sizes[comm.rank],), comm.rank), sizes)
                assert joined.tolist() == [0] * entries + [2]

    shared_memory(3, body)


def test_results_are_no_views_of_the_slots() -> None:
    """What was returned stays as it is while the slots are used again."""

    def body(comm: Communicator) -> None:
        given = [torch.full((2, 3), float(10 * number + comm.rank)) for number in range(6)]
        totals = [comm.all_reduce(tensor.clone()) for tensor in given]
        joined = [comm.all_gather(tensor, [2, 2], 0) for tensor in given]
        exchanged = [comm.all_to_all(tensor, [[1, 1], [1, 1]]) for tensor in given]
        for number, (total, both, halves) in enumerate(zip(totals, joined, exchanged, strict=True)):
            ten = 10.0 * number
            assert total.tolist() == [[2 * ten + 1] * 3] * 2
            assert both.tolist() == [[ten] * 3] * 2 + [[ten + 1] * 3] * 2
            assert halves.tolist() == [[ten] * 3, [ten + 1] * 3]

    shared_memory(2, body)


def test_counts_beyond_32_bits() -> None:
    """The kernel compares the low half only; counts are 64 bits wide."""
    start = 2**32 - 3

    def body(comm: RankComm, rank: int) -> None:
        assert isinstance(comm.tp, SharedMemoryCommunicator)
        comm.tp._count = start
        comm.tp._counters.publish(start)
        for number in range(8):
            assert comm.tp.all_reduce(torch.tensor([number + rank])).item() == 2 * number + 1

    on_ranks(small(1, 2), body)
