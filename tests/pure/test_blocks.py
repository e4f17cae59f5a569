"""Blocks and block tables: nothing lost, nothing held twice, windows slide."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.cost.blocks import peak_blocks
from spanwise.scheduler.block_table import BlockTable, max_positions
from spanwise.scheduler.blocks import BlockPool
from spanwise.types.cache import CacheGroup, CacheLayout


def make_layout(block_size: int, *groups: tuple[int, int]) -> CacheLayout:
    """A layout of (window, num_blocks) groups."""
    made = tuple(CacheGroup((i,), window, blocks) for i, (window, blocks) in enumerate(groups))
    return CacheLayout(block_size, made)


def make_table(layout: CacheLayout) -> tuple[BlockTable, tuple[BlockPool, ...]]:
    pools = tuple(BlockPool(group.num_blocks) for group in layout.groups)
    return BlockTable(layout, pools), pools


def test_pool_counts_up_and_reuses_the_last_freed() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == (0, 1, 2)
    pool.free((1,))
    assert (pool.num_free, pool.num_used) == (2, 2)
    assert pool.allocate(2) == (1, 3)
    assert pool.allocate(0) == ()


def test_pool_refuses_what_breaks_it() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="1 of 0"):
        pool.allocate(2)
        pool.allocate(1)
    pool.free((0,))
    with pytest.raises(AssertionError, match="twice"):
        pool.free((0,))


@given(st.lists(st.integers(-5, 5)))
def test_pool_holds_each_block_once(changes: list[int]) -> None:
    pool = BlockPool(12)
    held: list[int] = []
    for change in changes:
        if 0 <= change <= pool.num_free:
            held.extend(pool.allocate(change))
        elif change < 0:
            pool.free(held[:-change])
            del held[:-change]
        assert len(set(held)) == len(held) == pool.num_used


def test_table_grows_only_by_what_is_missing() -> None:
    table, pools = make_table(make_layout(4, (0, 8)))
    assert table.extend(5) == ((0, 1),)
    assert table.extend(8) == ((),)
    assert table.extend(9) == ((2,),)
    table.release()
    assert pools[0].num_used == 0
    assert table.held == ((),)


def test_windowed_table_frees_blocks_out_of_reach_only() -> None:
    # Window 4, blocks of 2: position 6 reads 3 to 6, so only the block of 0 and 1 is dead.
    table, pools = make_table(make_layout(2, (4, 8)))
    table.extend(6)
    assert table.room(6) == (3 + 5 + 1) * 2 - 6
    assert table.held == ((1, 2),)
    assert table.extend(7) == ((0,),)
    table.room(7)
    assert table.held == ((2, 0),)
    assert pools[0].num_used == 2


def test_room_is_what_the_tightest_group_has() -> None:
    table, _ = make_table(make_layout(4, (0, 3), (0, 5)))
    assert table.room(0) == 12
    table.extend(6)
    assert table.room(6) == 6


@pytest.mark.parametrize("window", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_peak_is_reached_and_never_passed(window: int, block_size: int, chunk: int) -> None:
    positions = 60
    group = CacheGroup((0,), window, 100)
    table, pools = make_table(CacheLayout(block_size, (group,)))
    most = 0
    for first in range(1, chunk + 1):  # every alignment of the chunks to the blocks
        start, end = 0, first
        while start < positions:
            table.room(start)
            table.extend(end)
            most = max(most, pools[0].num_used)
            start, end = end, min(positions, end + chunk)
        table.release()
    bound = peak_blocks(group, block_size, positions, chunk)
    assert most <= bound
    if chunk in (1, 2):
        assert most == bound


def test_needed_never_asks_for_more_than_there_is() -> None:
    table, _ = make_table(make_layout(2, (0, 10), (4, 3), (4, 10)))
    assert table.needed(9, 100) == (5, 3, 5)
    assert table.needed(9, 2) == (5, 3, 3)


def test_max_positions() -> None:
    assert max_positions(make_layout(4, (0, 10))) == 40
    assert max_positions(make_layout(4, (0, 10), (0, 7))) == 28
    assert max_positions(make_layout(4, (8, 3))) == sys.maxsize
    assert max_positions(make_layout(4, (8, 2))) == 8
    assert max_positions(make_layout(4, (0, 10), (8, 3))) == 40
