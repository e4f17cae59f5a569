"""Communicators, the ranks being threads: every implementation through the same checks."""

from __future__ import annotations

import time

import pytest
import torch
from tests.support.ranks import BACKENDS, Run, drawn, expected_sum

from spanwise.comm.communicator import Communicator
from spanwise.comm.single import SingleCommunicator

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 11), (0,), (4, 0, 3), (64,), (65,), (9, 129)]


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_reduce_equals_a_sum_in_rank_order(run: Run, size: int) -> None:
    cases = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]

    def body(comm: Communicator) -> list[torch.Tensor]:
        assert comm.size == size
        given = [drawn(shape, dtype, comm.rank) for dtype, shape in cases]
        got = [comm.all_reduce(tensor) for tensor in given]
        assert all(one is other for one, other in zip(given, got, strict=True)), "in place"
        return got

    results = run(size, body)
    for number, (dtype, shape) in enumerate(cases):
        want = expected_sum([drawn(shape, dtype, rank) for rank in range(size)])
        for result in results:
            assert torch.equal(result[number], want), (dtype, shape)


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [(3,), (1, 1), (2, 5), (0, 4), (4, 0), (0, 0), (1, 2, 3), (70, 0, 1), (2, 0, 130, 1)],
    ids=str,
)
def test_all_gather_of_uneven_sizes_along_every_dim(run: Run, sizes: tuple[int, ...]) -> None:
    others = (3, 4)
    cases = [(dim, dtype) for dim in (0, 1, 2, -1) for dtype in (torch.float32, torch.int64)]

    def part(rank: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        shape = list(others)
        shape.insert(dim % 3, sizes[rank])
        return drawn(shape, dtype, rank)

    def body(comm: Communicator) -> list[torch.Tensor]:
        return [comm.all_gather(part(comm.rank, *case), sizes, case[0]) for case in cases]

    results = run(len(sizes), body)
    for number, (dim, dtype) in enumerate(cases):
        want = torch.cat([part(rank, dim, dtype) for rank in range(len(sizes))], dim=dim)
        for result in results:
            assert torch.equal(result[number], want), (dim, dtype)


EXCHANGES = [
    [[3]],
    [[0]],
    [[1, 1], [1, 1]],
    [[2, 5], [0, 3]],
    [[0, 0], [4, 0]],
    [[0, 0], [0, 0]],
    [[9, 0], [0, 9]],
    [[1, 2, 3], [0, 0, 7], [5, 1, 0]],
    [[0, 130, 1], [70, 0, 0], [0, 2, 0]],
    [[1, 0, 2, 40], [3, 3, 0, 0], [0, 0, 0, 0], [1, 50, 1, 1]],
]


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize("sizes", EXCHANGES, ids=str)
def test_all_to_all_of_uneven_blocks(run: Run, sizes: list[list[int]]) -> None:
    cases = [(dtype, rest) for dtype in DTYPES for rest in [(), (1,), (3, 5), (0,), (41,)]]

    def block(source: int, target: int, dtype: torch.dtype, rest: tuple[int, ...]) -> torch.Tensor:
        return drawn((sizes[source][target], *rest), dtype, 10 * source + target)

    def body(comm: Communicator) -> list[torch.Tensor]:
        given = [
            torch.cat([block(comm.rank, target, *case) for target in range(comm.size)])
            for case in cases
        ]
        kept = [tensor.clone() for tensor in given]
        got = [comm.all_to_all(tensor, sizes) for tensor in given]
        assert all(torch.equal(*pair) for pair in zip(given, kept, strict=True))
        return got

    for rank, result in enumerate(run(len(sizes), body)):
        for got, case in zip(result, cases, strict=True):
            want = torch.cat([block(source, rank, *case) for source in range(len(sizes))])
            assert got.dtype == want.dtype and torch.equal(got, want), case


@pytest.mark.parametrize("run", BACKENDS)
def test_tensors_that_are_not_contiguous(run: Run) -> None:
    def body(comm: Communicator) -> tuple[torch.Tensor, ...]:
        small_one = drawn((5, 4), torch.float32, comm.rank).t()
        large = drawn((60, 31), torch.float32, comm.rank).t()
        strided = drawn((9, 8), torch.float32, comm.rank)[:, ::2]
        gathered = comm.all_gather(strided.t(), [4, 4], dim=0)
        exchanged = comm.all_to_all(strided.t(), [[1, 3], [3, 1]])
        return comm.all_reduce(small_one), comm.all_reduce(large), gathered, exchanged

    first, second = run(2, body)
    a, b = (drawn((5, 4), torch.float32, rank).t() for rank in (0, 1))
    c, d = (drawn((60, 31), torch.float32, rank).t() for rank in (0, 1))
    e, f = (drawn((9, 8), torch.float32, rank)[:, ::2].t() for rank in (0, 1))
    for result in (first, second):
        assert torch.equal(result[0], a + b)
        assert torch.equal(result[1], c + d)
        assert torch.equal(result[2], torch.cat([e, f]))
    assert torch.equal(first[3], torch.cat([e[:1], f[:3]]))
    assert torch.equal(second[3], torch.cat([e[1:], f[3:]]))


@pytest.mark.parametrize("run", BACKENDS)
def test_large_sums_have_the_same_bits_everywhere_and_at_every_size(run: Run) -> None:
    """A row's sum does not depend on how much travels with it (one shot, shares, pieces)."""
    whole = [drawn((300, 400), torch.bfloat16, rank) for rank in range(3)]
    want = expected_sum(whole)

    def body(comm: Communicator) -> list[torch.Tensor]:
        own = whole[comm.rank]
        return [comm.all_reduce(own.clone()), comm.all_reduce(own[:2].clone())]

    for large, few in run(3, body):
        assert torch.equal(large, want)
        assert torch.equal(few, want[:2])


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_order_of_a_sum_is_that_of_the_ranks(run: Run, dtype: torch.dtype) -> None:
    given = [60000.0, -60000.0, 2.0**-12]  # in any other order the last is lost

    def body(comm: Communicator) -> float:
        return comm.all_reduce(torch.tensor([given[comm.rank]], dtype=dtype)).item()

    assert run(3, body) == [2.0**-12] * 3


@pytest.mark.parametrize("run", BACKENDS)
def test_barrier_lets_nobody_through_before_the_last(run: Run) -> None:
    came: list[int] = []

    def body(comm: Communicator) -> int:
        if comm.rank == 1:
            time.sleep(0.05)  # the late rank is the case itself, not a wait for something
        came.append(comm.rank)
        comm.barrier()
        return len(came)

    assert run(3, body) == [3, 3, 3]


def test_single_copies_nothing() -> None:
    comm = SingleCommunicator()
    tensor = torch.ones(2, 3)
    assert comm.all_reduce(tensor) is tensor
    assert comm.all_gather(tensor, [3]) is tensor
    assert comm.all_to_all(tensor, [[2]]) is tensor
    comm.barrier()
    assert (comm.rank, comm.size) == (0, 1)
    with pytest.raises(AssertionError):
        comm.all_gather(tensor, [2])
    with pytest.raises(AssertionError):
        comm.all_to_all(tensor, [[3]])
