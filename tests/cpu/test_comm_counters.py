"""Counters: waits that end, and sleepers that are woken."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.support.ranks import segment, shared_memory, small

from spanwise.comm import futex
from spanwise.comm.communicator import Link, RankComm
from spanwise.comm.counters import Counters
from spanwise.comm.segment import Segment, interrupt
from spanwise.comm.shared_memory import open_rank_comm
from spanwise.errors import CommunicationError, WaitInterruptedError


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


def test_without_futexes_waits_still_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futex, "_NUMBER", None)
    monkeypatch.setattr(futex, "TOTAL_STORE_ORDER", False)
    results = shared_memory(3, lambda comm: [comm.all_reduce(torch.ones(2)) for _ in range(50)])
    assert all(torch.equal(each, torch.full((2,), 3.0)) for result in results for each in result)
    with segment(small(1, 2)) as fd:
        comm = open_rank_comm(fd, 0, 0, spin_s=0, timeout_s=0.05)
        with pytest.raises(CommunicationError, match="waited"):
            comm.tp.barrier()


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
