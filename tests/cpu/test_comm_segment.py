"""The memory that the ranks of a replica share."""

from __future__ import annotations

import gc
import os
from itertools import pairwise
from pathlib import Path

import pytest
from tests.support.ranks import segment, small

from spanwise.comm.segment import Segment, SegmentLayout, create_segment
from spanwise.comm.shared_memory import open_rank_comm


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
