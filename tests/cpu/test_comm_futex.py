"""Sleeping on a word of shared memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support.ranks import segment, small

from spanwise.comm import futex
from spanwise.comm.segment import Segment


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
