"""Communicators and links, the ranks being threads of one process."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist

from spanwise.comm import futex, nccl
from spanwise.comm.communicator import Communicator, Link, RankComm
from spanwise.comm.counters import Counters
from spanwise.comm.process_group import GroupCommunicator, GroupLink, Operations
from spanwise.comm.segment import (
    Segment,
    SegmentLayout,
    create_segment,
    interrupt,
)
from spanwise.comm.shared_memory import SharedMemoryCommunicator, open_rank_comm, tiles
from spanwise.comm.single import SingleCommunicator
from spanwise.comm.store import listen_on_loopback
from spanwise.errors import CommunicationError, WaitInterruptedError

T = TypeVar("T")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 11), (0,), (4, 0, 3), (64,), (65,), (9, 129)]


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


# --- one implementation after another through the same checks ---------------------------------


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


BACKENDS = [shared_memory, process_group]
Run = Callable[[int, Callable[[Communicator], object]], list[object]]


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


@pytest.mark.parametrize("run", BACKENDS)
def test_tensors_that_are_not_contiguous(run: Run) -> None:
    def body(comm: Communicator) -> tuple[torch.Tensor, ...]:
        small_one = drawn((5, 4), torch.float32, comm.rank).t()
        large = drawn((60, 31), torch.float32, comm.rank).t()
        strided = drawn((9, 8), torch.float32, comm.rank)[:, ::2]
        gathered = comm.all_gather(strided.t(), [4, 4], dim=0)
        return comm.all_reduce(small_one), comm.all_reduce(large), gathered

    first, second = run(2, body)
    a, b = (drawn((5, 4), torch.float32, rank).t() for rank in (0, 1))
    c, d = (drawn((60, 31), torch.float32, rank).t() for rank in (0, 1))
    e, f = (drawn((9, 8), torch.float32, rank)[:, ::2].t() for rank in (0, 1))
    for result in (first, second):
        assert torch.equal(result[0], a + b)
        assert torch.equal(result[1], c + d)
        assert torch.equal(result[2], torch.cat([e, f]))


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
    comm.barrier()
    assert (comm.rank, comm.size) == (0, 1)
    with pytest.raises(AssertionError):
        comm.all_gather(tensor, [2])


def test_all_gather_checks_what_it_is_given() -> None:
    def body(comm: Communicator) -> None:
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


class GlooAsNccl(dist.ProcessGroupGloo):
    """What NcclGroups asks of NCCL, without cards."""

    class Options:
        _timeout: timedelta

    def __init__(self, store: dist.Store, rank: int, size: int, options: Options) -> None:
        super().__init__(store, rank, size, options._timeout)

    def eager_connect_single_device(self, device: torch.device) -> None:
        assert device == torch.device("cpu")


def test_nccl_groups_meet_through_a_store_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ranks form which groups, over a real store; the library itself needs cards."""
    monkeypatch.setattr(dist, "ProcessGroupNCCL", GlooAsNccl, raising=False)
    for name in nccl._ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    listener = listen_on_loopback()
    host, port = listener.getsockname()
    store = nccl.serve_store(listener)
    assert (host, store.port) == ("127.0.0.1", port)

    def call(rank: int) -> None:
        stage, tp_rank = divmod(rank, 2)
        groups = nccl.NcclGroups(
            nccl.connect_store(port),
            name="replica 0 epoch 1",
            pp_size=3,
            tp_size=2,
            pp_rank=stage,
            tp_rank=tp_rank,
            device=torch.device("cpu"),
            timeout_s=30.0,
        )
        for number in range(9):
            _around(groups.comm, number)
        groups.comm.tp.barrier()
        groups.abort(10.0)
        place = f"stage {stage} tp rank {tp_rank} in tp/{stage}: "
        with pytest.raises(WaitInterruptedError, match=place):
            groups.comm.tp.barrier()

    together([lambda rank=rank: call(rank) for rank in range(6)])
    assert {os.environ[name] for name in nccl._ENVIRONMENT} == {"0"}


def _around(comm: RankComm, number: int) -> None:
    """A tensor through three stages, doubled by each, and back to the first."""
    tensor = torch.full((5,), float(number))
    if comm.inbox is not None:
        comm.inbox.recv(tensor)
    comm.tp.all_reduce(tensor)
    if comm.outbox is not None:
        comm.outbox.send(tensor)
    elif comm.tokens is not None:
        comm.tokens.send(tensor)
    if comm.inbox is None:
        assert comm.tokens is not None
        assert comm.tokens.recv(tensor).tolist() == [8.0 * number] * 5


def test_an_abort_that_hangs_is_given_up_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", GlooAsNccl, raising=False)
    over = threading.Event()
    monkeypatch.setattr(GlooAsNccl, "abort", lambda self: over.wait(), raising=False)
    store = dist.HashStore()

    def call(rank: int) -> None:
        place = {"pp_size": 1, "tp_size": 2, "pp_rank": 0, "tp_rank": rank}
        device = torch.device("cpu")
        groups = nccl.NcclGroups(store, name="epoch 2", device=device, timeout_s=30.0, **place)
        with pytest.raises(CommunicationError, match=r"more than 0\.05 s; replace this worker"):
            groups.abort(0.05)

    try:
        together([lambda: call(0), lambda: call(1)])
    finally:
        over.set()


# --- links --------------------------------------------------------------------------------------


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


# --- the segment --------------------------------------------------------------------------------


@pytest.mark.parametrize(("pp_size", "tp_size"), [(1, 1), (1, 4), (3, 1), (2, 3), (2, 70)])
def test_nothing_in_a_segment_overlaps(pp_size: int, tp_size: int) -> None:
    layout = small(pp_size, tp_size)
    spans = [(0, 4096)]
    for channel in layout.channels:
        spans += [
            (channel.counter_at(m), channel.counter_at(m) + 64) for m in range(channel.num_members)
        ]
        spans.append((channel.parked_at, channel.parked_at + channel.num_members))
        end = channel.slots_at + channel.num_slots * channel.slot_bytes
        spans.append((channel.slots_at, end))
        assert channel.counters_at % 64 == channel.parked_at % 64 == channel.slots_at % 64 == 0
    spans = sorted(span for span in spans if span[0] < span[1])
    for (_, end), (start, _) in pairwise(spans):
        assert end <= start
    assert spans[-1][1] <= layout.total_bytes
    assert len(layout.channels) == pp_size + pp_size * tp_size * (pp_size > 1)
    assert len(set(layout.channels)) == len(layout.channels)


def test_a_segment_says_its_own_layout() -> None:
    layout = SegmentLayout(2, 3, 640, 1280, 5, 192)
    with segment(layout) as fd:
        assert os.fstat(fd).st_size == layout.total_bytes
        assert Segment(fd).layout == layout


def test_a_mapping_goes_with_its_last_channel() -> None:
    def mapped() -> bool:
        return "memfd:passing" in Path("/proc/self/maps").read_text()

    before = sorted(os.listdir("/dev/shm"))
    fd = create_segment("passing", small(2, 2))
    comm = open_rank_comm(fd, 0, 0)
    os.close(fd)
    assert mapped()
    assert sorted(os.listdir("/dev/shm")) == before
    del comm
    gc.collect()
    assert not mapped()


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


# --- waits that end -----------------------------------------------------------------------------


def blocked_waits() -> dict[str, Callable[[RankComm, RankComm], object]]:
    """Each blocks for ever on the first (stage 0) or second (stage 1) rank given."""

    def fill(link: Link | None) -> None:
        assert link is not None
        for _ in range(10):
            link.send(torch.ones(4))

    return {
        "all_reduce": lambda first, second: first.tp.all_reduce(torch.ones(3)),
        "all_gather": lambda first, second: first.tp.all_gather(torch.ones(3), [3, 1]),
        "barrier": lambda first, second: second.tp.barrier(),
        "recv": lambda first, second: second.inbox and second.inbox.recv(torch.ones(3)),
        "send": lambda first, second: fill(first.outbox),
    }


@pytest.mark.parametrize("name", blocked_waits())
@pytest.mark.parametrize("spin_s", [0.0, 50e-6])
def test_interrupt_breaks_a_blocked_wait(name: str, spin_s: float) -> None:
    with segment(small(2, 2)) as fd:
        first, second = (open_rank_comm(fd, stage, 0, spin_s=spin_s) for stage in (0, 1))
        with ThreadPoolExecutor(1) as pool:
            blocked = pool.submit(blocked_waits()[name], first, second)
            with pytest.raises(TimeoutError):
                blocked.result(timeout=0.1)
            start = time.monotonic()
            interrupt(fd)
            said = rf"stage \d tp rank 0: {name} .* waiting for"
            with pytest.raises(WaitInterruptedError, match=said):
                blocked.result(timeout=5)
            assert time.monotonic() - start < 0.1
        for inbox in (second.inbox, open_rank_comm(fd, 1, 1).inbox):
            assert inbox is not None
            with pytest.raises(WaitInterruptedError):
                while True:  # what was sent before still comes
                    inbox.recv(torch.empty(4))


@pytest.mark.parametrize("spin_s", [0.0, 50e-6])
def test_a_wait_that_lasts_too_long_says_who_waits_for_whom(spin_s: float) -> None:
    with segment(small(1, 3)) as fd:
        comm = open_rank_comm(fd, 0, 2, spin_s=spin_s, timeout_s=0.1)
        with pytest.raises(CommunicationError) as caught:
            comm.tp.all_reduce(torch.ones(3))
    message = str(caught.value)
    assert not isinstance(caught.value, WaitInterruptedError)
    assert "\n" not in message
    for words in (
        "stage 0 tp rank 2: all_reduce number 1 waited 0.1 s for stage 0 tp rank 0",
        "has done 0",
    ):
        assert words in message


@pytest.mark.parametrize("run", [process_group])
def test_a_failed_group_operation_is_named_or_an_interruption(run: Run) -> None:
    def failing() -> object:
        raise RuntimeError("socket closed\nC++ frames")

    stopped = threading.Event()
    operations = Operations(dist.ProcessGroupGloo(dist.HashStore(), 0, 1), "rank 0", stopped)
    with pytest.raises(CommunicationError, match=r"^rank 0: send number 1 failed: socket closed$"):
        operations.start("send", failing)
    stopped.set()
    with pytest.raises(WaitInterruptedError):
        operations.run("send", failing)


def test_without_futexes_waits_still_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futex, "_NUMBER", None)
    monkeypatch.setattr(futex, "TOTAL_STORE_ORDER", False)
    results = shared_memory(3, lambda comm: [comm.all_reduce(torch.ones(2)) for _ in range(50)])
    assert all(torch.equal(each, torch.full((2,), 3.0)) for result in results for each in result)
    with segment(small(1, 2)) as fd:
        comm = open_rank_comm(fd, 0, 0, spin_s=0, timeout_s=0.05)
        with pytest.raises(CommunicationError, match="waited"):
            comm.tp.barrier()


def test_a_futex_sleeps_until_woken_or_too_late() -> None:
    with segment(small(1, 2)) as fd:
        shared = Segment(fd)
        address = shared.address + shared.layout.group(0).counter_at(0)
        start = time.monotonic()
        futex.wait(address, 1, 10.0)  # another value: does not sleep
        futex.wait(address, 0, 0.02)  # nobody wakes it
        assert 0.02 <= time.monotonic() - start < 5
        with ThreadPoolExecutor(1) as pool:
            sleeping = pool.submit(futex.wait, address, 0, 20.0)
            while not sleeping.done():
                futex.wake(address)
            sleeping.result()
        assert time.monotonic() - start < 10
        with pytest.raises(OSError, match="argument"):
            futex.wait(address + 1, 0, 0.01)


def test_a_publisher_calls_the_system_only_for_sleepers(monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[int] = []
    monkeypatch.setattr(futex, "wake", woken.append)
    with segment(small(1, 3)) as fd:
        shared = Segment(fd)
        channel = shared.layout.group(0)
        counters = Counters(shared, channel, 1, ["a", "b", "c"])
        counters.publish(1)
        shared.memory[channel.parked_at + 2] = 1  # asleep, but waiting for member 0
        counters.publish(2)
        assert woken == []
        shared.memory[channel.parked_at + 2] = 2
        counters.publish(3)
        assert woken == [shared.address + channel.counter_at(1)]


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
