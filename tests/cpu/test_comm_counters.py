"""Counters: waits that end, and sleepers that are woken."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.support.ranks import segment, shared_memory, small

from spanwise.comm import counters as counters_module
from spanwise.comm import futex
from spanwise.comm.communicator import Link, RankComm
from spanwise.comm.counters import DEFAULT_SPIN_S, Counters
from spanwise.comm.segment import Segment, interrupt
from spanwise.comm.shared_memory import open_rank_comm
from spanwise.errors import CommunicationError, WaitInterruptedError


def blocked_waits() -> dict[str, Callable[[RankComm, RankComm], object]]:
    """Each blocks for ever on the first (stage 0) or second (stage 1) rank given."""

    def fill(link: Link | None) -> None:
        assert link is not None
        for _ in range(10):
            link.send(torch.ones(4))

    def answer(link: Link | None) -> None:
        assert link is not None
        link.send(torch.ones(500))

    crossed = [[2, 200], [200, 2]]
    return {
        "all_reduce": lambda first, second: first.tp.all_reduce(torch.ones(3)),
        "all_reduce of several pieces": lambda first, second: first.tp.all_reduce(torch.ones(300)),
        "all_reduce of a strided one": lambda first, second: second.tp.all_reduce(
            torch.ones(40, 30).t()
        ),
        "all_gather": lambda first, second: first.tp.all_gather(torch.ones(3), [3, 1]),
        "all_gather in tiles": lambda first, second: first.tp.all_gather(
            torch.ones(9, 3), [3, 100]
        ),
        "all_to_all": lambda first, second: first.tp.all_to_all(torch.ones(3, 2), [[1, 2], [2, 1]]),
        "all_to_all of several pieces": lambda first, second: first.tp.all_to_all(
            torch.ones(202), crossed
        ),
        "barrier": lambda first, second: second.tp.barrier(),
        "recv": lambda first, second: second.inbox and second.inbox.recv(torch.ones(3)),
        "recv of sampled ids": lambda first, second: (
            first.tokens and first.tokens.recv(torch.ones(3))
        ),
        "send": lambda first, second: fill(first.outbox),
        "send of several pieces": lambda first, second: answer(first.outbox),
        "send of sampled ids": lambda first, second: fill(second.tokens),
    }


@pytest.mark.parametrize("name", blocked_waits())
@pytest.mark.parametrize("spin_s", [0.0, DEFAULT_SPIN_S])
def test_interrupt_breaks_a_blocked_wait(name: str, spin_s: float) -> None:
    with segment(small(2, 2)) as fd:
        first, second = (open_rank_comm(fd, stage, 0, spin_s=spin_s) for stage in (0, 1))
        with ThreadPoolExecutor(1) as pool:
            blocked = pool.submit(blocked_waits()[name], first, second)
            with pytest.raises(TimeoutError):
                blocked.result(timeout=0.1)
            start = time.monotonic()
            interrupt(fd)
            said = rf"stage \d tp rank 0: {name.split()[0]} number \d was .* waiting for"
            with pytest.raises(WaitInterruptedError, match=said):
                blocked.result(timeout=5)
            assert time.monotonic() - start < 0.1
        with pytest.raises(WaitInterruptedError):  # for good: the next epoch has another segment
            first.tp.all_to_all(torch.ones(2), [[1, 1], [1, 1]])
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


@pytest.mark.parametrize("num_members", [3, 8, 9, 20])
def test_a_publisher_sees_a_sleeper_at_any_place(
    monkeypatch: pytest.MonkeyPatch, num_members: int
) -> None:
    woken: list[int] = []
    monkeypatch.setattr(futex, "wake", woken.append)
    with segment(small(1, num_members)) as fd:
        shared = Segment(fd)
        channel = shared.layout.group(0)
        counters = Counters(shared, channel, 1, [str(n) for n in range(num_members)])
        for count, sleeper in enumerate((0, *range(2, num_members)), 1):
            shared.memory[channel.parked_at + sleeper] = 2
            counters.publish(count)
            assert len(woken) == count
            shared.memory[channel.parked_at + sleeper] = 0
        counters.publish(100)
    assert len(woken) == num_members - 1


class Spins:
    """A pair of counters under a clock of its own; says of each wait whether it spun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shared: Segment) -> None:
        self.now, self.num_looks, self.comes_at, self.yielded_at = 0.0, 0, 0, list[float]()
        monkeypatch.setattr(counters_module, "perf_counter", self._clock)
        monkeypatch.setattr(
            counters_module, "sched_yield", lambda: self.yielded_at.append(self.now)
        )
        monkeypatch.setattr(Counters, "_sleep", lambda *_: None)  # woken when the peer has come
        channel = shared.layout.group(0)
        self._mine, self._other = (Counters(shared, channel, n, ["a", "b"]) for n in range(2))
        self._count = 0

    def wait(self, comes_at: int = 0) -> bool:
        """Wait for a peer that comes before the given look, or only after the spin."""
        self.num_looks, self.comes_at = 0, comes_at
        self._count += 1
        self._mine.wait_for(1, self._count, "barrier")
        self._other.publish(self._count)
        return self.num_looks > 0

    def _clock(self) -> float:
        self.now += 1e-5
        self.num_looks += 1
        if self.num_looks == self.comes_at:
            self._other.publish(self._count)
        return self.now


def test_spins_in_vain_grow_rare_until_one_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    with segment(small(1, 2)) as fd:
        spins = Spins(monkeypatch, Segment(fd))
        in_vain = [spins.wait() for _ in range(60)]
        spun_at = [number for number, spun in enumerate(in_vain) if spun]
        assert spun_at == [0, 2, 6, 14, 30, 46]
        assert [spins.wait(comes_at=5) for _ in range(2, 10)] == [False, False, *[True] * 6]
        assert [spins.wait() for _ in range(4)] == [True, False, True, False]


def test_a_spin_offers_its_core_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with segment(small(1, 2)) as fd:
        spins = Spins(monkeypatch, Segment(fd))
        assert spins.wait(comes_at=4)
        assert spins.yielded_at == []
        start = spins.now
        assert spins.wait()
        assert spins.num_looks * 1e-5 == pytest.approx(DEFAULT_SPIN_S, rel=0.1)
        assert min(spins.yielded_at) - start > 45e-6
        assert len(spins.yielded_at) > 0.9 * spins.num_looks
