"""Communicators and links, the ranks being processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from tests.support.ranks import drawn, expected_sum, segment, small

from spanwise.comm.communicator import RankComm
from spanwise.comm.segment import SegmentLayout, interrupt
from spanwise.comm.shared_memory import open_rank_comm
from spanwise.errors import CommunicationError, WaitInterruptedError

_DEADLINE_S = 60.0


class Child(NamedTuple):
    """A forked process and the pipe on which it says what it found ("" for nothing wrong)."""

    pid: int
    pipe: int

    def report(self) -> str:
        with os.fdopen(self.pipe) as pipe:
            text = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return text or ("" if code == 0 else f"exit status {code}")


def fork(body: Callable[[], object]) -> Child:
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns where the parent has threads; the child computes with one of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _run_child(body, writes)
    os.close(writes)
    return Child(pid, reads)


def _run_child(body: Callable[[], object], pipe: int) -> None:
    signal.alarm(int(_DEADLINE_S))
    code = 0
    try:
        torch.set_num_threads(1)
        body()
    except BaseException:
        code = 1
        os.write(pipe, traceback.format_exc().encode())
    finally:
        os._exit(code)


def on_ranks(layout: SegmentLayout, body: Callable[[RankComm, int, int], object]) -> None:
    """``body(channels, stage, tp_rank)`` in a process for each rank; fails with their errors."""
    with segment(layout) as fd:

        def run(stage: int, tp_rank: int) -> None:
            try:
                body(open_rank_comm(fd, stage, tp_rank), stage, tp_rank)
            except BaseException:
                interrupt(fd)
                raise

        places = [
            (stage, rank) for stage in range(layout.pp_size) for rank in range(layout.tp_size)
        ]
        children = [fork(lambda place=place: run(*place)) for place in places]
        reports = [child.report() for child in children]
    assert not any(reports), "\n".join(reports)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives_equal_torch(size: int) -> None:
    sizes = [3, 0, 130, 7][:size]

    def body(comm: RankComm, stage: int, tp_rank: int) -> None:
        for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16) * 8):
            shape = (1 + number, 40)
            parts = [drawn(shape, dtype, 100 * number + rank) for rank in range(size)]
            want = expected_sum(parts)
            assert torch.equal(comm.tp.all_reduce(parts[tp_rank].clone()), want)
            for dim in (0, 1):
                shapes = [(n, 5) if dim == 0 else (5, n) for n in sizes]
                parts = [drawn(part, dtype, rank) for rank, part in enumerate(shapes)]
                got = comm.tp.all_gather(parts[tp_rank], sizes, dim)
                assert torch.equal(got, torch.cat(parts, dim))
            rows = [[(number + 3 * to) % 5 * (to != 1) for to in range(size)]] * size
            given = drawn((sum(rows[tp_rank]), 30), dtype, tp_rank)
            first = sum(rows[0][:tp_rank])
            want = [drawn((sum(rows[r]), 30), dtype, r)[first:] for r in range(size)]
            got = comm.tp.all_to_all(given, rows)
            assert torch.equal(got, torch.cat([part[: rows[0][tp_rank]] for part in want]))
            comm.tp.barrier()

    on_ranks(small(1, size), body)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_drift_apart_by_less_and_more_than_a_spin(size: int) -> None:
    """Operations of all kinds and sizes, empty and beyond a slot, with every way to wait."""
    rounds = 400

    def body(comm: RankComm, stage: int, tp_rank: int) -> None:
        delays, same = random.Random(tp_rank), random.Random(17)
        for number in range(rounds):
            if delays.random() < 0.1:
                time.sleep(delays.choice((0.0, 20e-6, 300e-6, 3e-3)))
            entries, kind = same.choice((0, 1, 7, 64, 65, 300)), number % 4
            parts = [drawn((entries,), torch.float32, number + rank) for rank in range(size)]
            if kind == 0:
                total = comm.tp.all_reduce(parts[tp_rank].clone())
                assert torch.equal(total, expected_sum(parts))
            elif kind == 1:
                sizes = [len(part) // (1 + rank) for rank, part in enumerate(parts)]
                given = [part[:entries] for part, entries in zip(parts, sizes, strict=True)]
                got = comm.tp.all_gather(given[tp_rank], sizes)
                assert torch.equal(got, torch.cat(given))
            elif kind == 2:
                rows = [[len(run) for run in part.chunk(size)] for part in parts]
                rows = [line + [0] * (size - len(line)) for line in rows]
                want = [part.split(line)[tp_rank] for part, line in zip(parts, rows, strict=True)]
                assert torch.equal(comm.tp.all_to_all(parts[tp_rank], rows), torch.cat(want))
            else:
                comm.tp.barrier()

    on_ranks(small(1, size), body)


def test_more_ranks_than_cores_do_not_crawl() -> None:
    rounds = 200

    def body(comm: RankComm, stage: int, tp_rank: int) -> None:
        comm.tp.barrier()
        start = time.process_time()
        for number in range(rounds):
            total = comm.tp.all_reduce(torch.full((640,), float(number + tp_rank)))
            assert total[0].item() == 8 * number + 28
        # Ranks that only spun would each burn a scheduler's slice, milliseconds, a round. Time on
        # the processor is asserted, which does not depend on what else the machine does.
        assert (time.process_time() - start) / rounds < 0.001

    on_ranks(SegmentLayout(1, 8), body)


def test_a_pipeline_of_groups_under_random_delays() -> None:
    rounds = 800

    def body(comm: RankComm, stage: int, tp_rank: int) -> None:
        delays = random.Random(stage * 2 + tp_rank)
        for number in range(rounds):
            if delays.random() < 0.02:
                time.sleep(delays.random() * 0.002)
            tensor = torch.full((1 + (number * 37) % 500,), float(number))
            if comm.inbox is not None:
                comm.inbox.recv(tensor.zero_())
            assert tensor.eq(number * 2**stage).all()
            tensor = comm.tp.all_reduce(tensor)
            if comm.outbox is not None:
                comm.outbox.send(tensor)
            elif comm.tokens is not None:
                comm.tokens.send(tensor[:1].long())
            if stage == 0 and number > 0:
                assert comm.tokens is not None
                token = comm.tokens.recv(torch.empty(1, dtype=torch.int64))
                assert token.item() == 4 * (number - 1)

    on_ranks(small(2, 2), body)


def test_survivors_of_a_killed_rank_can_be_interrupted() -> None:
    def wait_for_ever(fd: int, rank: int) -> None:
        comm = open_rank_comm(fd, 0, rank)
        with pytest.raises(WaitInterruptedError, match="stage 0 tp rank 2"):
            while True:
                comm.tp.all_reduce(torch.ones(64))

    def die(fd: int) -> None:
        comm = open_rank_comm(fd, 0, 2)
        for _ in range(50):
            comm.tp.all_reduce(torch.ones(64))
        os.kill(os.getpid(), signal.SIGKILL)

    with segment(small(1, 3)) as fd:
        children = [fork(lambda rank=rank: wait_for_ever(fd, rank)) for rank in (0, 1)]
        assert fork(lambda: die(fd)).report() == "exit status -9"
        start = time.monotonic()
        interrupt(fd)
        assert [child.report() for child in children] == ["", ""]
        assert time.monotonic() - start < 5.0


def test_a_sleeping_process_is_interrupted_within_a_tenth_of_a_second() -> None:
    with segment(small(2, 1)) as fd, segment(SegmentLayout(1, 1)) as clock:
        os.ftruncate(clock, 4096)

        def wait() -> None:
            comm = open_rank_comm(fd, 1, 0)
            assert comm.inbox is not None
            os.pwrite(clock, b"ready", 0)
            with pytest.raises(WaitInterruptedError):
                comm.inbox.recv(torch.empty(3))
            os.pwrite(clock, repr(time.monotonic()).encode(), 64)

        child = fork(wait)
        while os.pread(clock, 5, 0) != b"ready":
            os.sched_yield()
        time.sleep(0.1)  # long enough that it surely sleeps
        start = time.monotonic()
        interrupt(fd)
        assert child.report() == ""
        assert float(os.pread(clock, 32, 64).rstrip(b"\0")) - start < 0.1


def test_a_dead_peer_ends_a_wait_by_its_time_limit() -> None:
    with segment(small(2, 1)) as fd:
        assert fork(lambda: open_rank_comm(fd, 0, 0)).report() == ""
        inbox = open_rank_comm(fd, 1, 0, timeout_s=0.1).inbox
        assert inbox is not None
        with pytest.raises(CommunicationError, match=r"recv number 1 waited .* stage 0 tp rank 0"):
            inbox.recv(torch.empty(3))


def test_a_segment_reaches_a_process_that_was_not_forked() -> None:
    """Through the descriptor alone, as a supervisor hands it out; without torch on that side."""
    program = (
        "import sys; from spanwise.comm.segment import interrupt; interrupt(int(sys.argv[1])); "
        "sys.exit('torch' in sys.modules)"
    )
    with segment(small(1, 2)) as fd:
        command = [sys.executable, "-c", program, str(fd)]
        subprocess.run(command, pass_fds=[fd], check=True, timeout=30)
        with pytest.raises(WaitInterruptedError):
            open_rank_comm(fd, 0, 0).tp.barrier()
