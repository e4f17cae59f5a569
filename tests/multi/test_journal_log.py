"""The journal is read back as it was written, whenever its writer was killed."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

from spanwise.control.entries import Accepted, Admitted, ChoiceRecord, Forgotten
from spanwise.engine.journal_log import JournalLog
from spanwise.types.sampling import SamplingSpec


@pytest.fixture
def fd() -> Iterator[int]:
    number = os.memfd_create("journal-test")
    yield number
    os.close(number)


def admitted(request_id: int, num_prompt: int = 4) -> Admitted:
    choice = ChoiceRecord(request_id, SamplingSpec(seed=request_id))
    return Admitted(
        request_id=request_id, prompt_token_ids=tuple(range(num_prompt)), choices=(choice,)
    )


def test_a_log_is_read_back(fd: int) -> None:
    log = JournalLog(fd)
    log.write(admitted(1))
    log.write(admitted(2))
    log.write(Accepted((1, 2, 1), (7, 8, 9)))
    log.write(Forgotten(2))
    again = JournalLog(fd)
    (resumed,) = again.journal.live()
    assert resumed.sequence_id == 1 and resumed.output_token_ids == (7, 9)
    again.write(Accepted((1,), (10,)))
    log.close()
    again.close()
    third = JournalLog(fd)
    assert third.journal.live()[0].output_token_ids == (7, 9, 10)
    third.close()


def test_a_log_that_is_full_is_written_anew_and_memory_given_back(fd: int) -> None:
    log = JournalLog(fd)
    chance = random.Random(3)
    live: dict[int, list[int]] = {}
    for request_id in range(3000):
        log.write(admitted(request_id, num_prompt=chance.choice((3, 600))))
        live[request_id] = []
        names = tuple(chance.sample(sorted(live), min(len(live), 8)))
        tokens = tuple(chance.randrange(50_000) for _ in names)
        log.write(Accepted(names, tokens))
        for name, token in zip(names, tokens, strict=True):
            live[name].append(token)
        if len(live) > 40:
            gone = chance.choice(sorted(live))
            del live[gone]
            log.write(Forgotten(gone))
    log.close()
    again = JournalLog(fd)
    assert {r.sequence_id: list(r.output_token_ids) for r in again.journal.live()} == live
    again.close()
    assert os.fstat(fd).st_blocks * 512 < 4 << 20


@pytest.mark.parametrize("seed", range(4))
def test_a_writer_killed_at_any_moment_leaves_a_whole_log(fd: int, seed: int) -> None:
    """The child says through a pipe what it has written; all of that must be there."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - another process
        os.close(read_end)
        log = JournalLog(fd)
        log.write(admitted(0))
        for token in range(10**9):
            if token % 50 == 0:
                log.write(admitted(token + 1, num_prompt=2000))
                log.write(Forgotten(token + 1))
            log.write(Accepted((0,), (token,)))
            os.write(write_end, b"\0")
    os.close(write_end)
    wanted = random.Random(seed).randrange(500, 20_000)
    told = 0
    while told < wanted:
        told += len(os.read(read_end, 4096))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(read_end, 4096):
        told += len(more)
    os.close(read_end)
    log = JournalLog(fd)
    tokens = log.journal.live()[0].output_token_ids
    assert len(tokens) in (told, told + 1)
    assert tokens == tuple(range(len(tokens)))
    log.close()
