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


# Blocks that keep a prefix.


def key(index: int) -> bytes:
    return b"key %d" % index


def test_a_freed_block_with_a_key_is_kept_and_can_be_shared() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.register(second, key(0))
    pool.free((first, second))
    assert (pool.num_free, pool.find(key(0)), pool.is_held(second)) == (3, second, False)
    assert pool.share(key(0)) == second
    assert pool.share(key(0)) == second
    assert (pool.num_free, pool.is_held(second)) == (2, True)
    pool.free((second,))
    assert (pool.num_free, pool.is_held(second)) == (2, True), "one still reads it"
    pool.free((second,))
    assert pool.num_free == 3


def test_blank_blocks_go_first_then_those_freed_longest_ago() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    for block in blocks:
        pool.register(block, key(block))
    pool.free((2, 0))
    pool.free((1,))
    pool.share(key(0))
    pool.free((0, 3))
    assert pool.allocate(4) == (4, 2, 1, 0)
    assert [pool.find(key(block)) for block in blocks] == [None, None, None, 3]


def test_a_key_stays_with_a_block_that_is_held() -> None:
    pool = BlockPool(4)
    ours, theirs = pool.allocate(2)
    pool.register(ours, key(0))
    pool.register(theirs, key(0))
    assert pool.find(key(0)) == ours
    pool.free((ours,))
    (third,) = pool.allocate(1)
    pool.register(third, key(0))
    assert pool.find(key(0)) == third, "the one held is there for longer"
    assert pool.allocate(1) == (ours,), "the other is blank now"


def test_what_is_forgotten_is_free_and_cannot_be_found() -> None:
    pool = BlockPool(3)
    held, kept = pool.allocate(2)
    for block in (held, kept):
        pool.register(block, key(block))
    pool.free((kept,))
    pool.forget()
    assert (pool.num_free, pool.find(key(held)), pool.find(key(kept))) == (2, None, None)
    pool.register(held, key(5))
    assert pool.find(key(5)) == held


def test_a_block_nobody_holds_gets_no_key() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="held by nobody"):
        pool.register(0, key(0))
    with pytest.raises(AssertionError, match="is gone"):
        pool.share(key(0))


@given(st.lists(st.tuples(st.sampled_from("afrsx"), st.integers(0, 9))))
def test_a_pool_loses_no_block_and_no_key(calls: list[tuple[str, int]]) -> None:
    """Against a list of holders, and what each key was last given to."""
    pool = BlockPool(5)
    holders: list[int] = []
    named: dict[int, bytes] = {}
    for call, number in calls:
        if call == "a" and pool.num_free:
            (block,) = pool.allocate(1)
            assert block not in holders
            named.pop(block, None)
            holders.append(block)
        elif call == "f" and holders:
            pool.free((holders.pop(number % len(holders)),))
        elif call == "r" and holders:
            block = holders[number % len(holders)]
            if block not in named:
                pool.register(block, key(number))
                if pool.find(key(number)) == block:
                    named = {b: k for b, k in named.items() if k != key(number)}
                    named[block] = key(number)
        elif call == "s" and pool.find(key(number)) is not None:
            block = pool.share(key(number))
            assert named[block] == key(number), "found under the wrong key"
            holders.append(block)
        elif call == "x":
            pool.forget()
            named.clear()
        assert pool.num_used == len(set(holders))
        assert all(pool.find(k) == b for b, k in named.items())
        assert sum(pool.find(key(i)) is not None for i in range(10)) == len(named)
    pool.free(holders)
    assert sorted(pool.allocate(5)) == [0, 1, 2, 3, 4]


def begun_table(layout: CacheLayout, num_keys: int) -> tuple[BlockTable, tuple[BlockPool, ...]]:
    """A table that found its first blocks, which another had filled and let go of."""
    table, pools = make_table(layout)
    keys = [key(index) for index in range(num_keys)]
    table.extend(num_keys * layout.block_size)
    table.register(keys)
    table.release()
    begun = BlockTable(layout, pools)
    assert begun.match(keys) == num_keys
    begun.attach(keys)
    return begun, pools


def test_a_table_begins_with_what_is_found_and_tells_of_it_once() -> None:
    table, pools = begun_table(make_layout(2, (0, 8), (4, 8)), 4)
    assert table.held == ((0, 1, 2, 3), (2, 3)), "position 8 sees 5, 6 and 7 and itself"
    assert [pool.num_used for pool in pools] == [4, 2]
    assert table.extend(9) == ((0, 1, 2, 3, 4), (0, 0, 2, 3, 4))
    assert table.extend(11) == ((5,), (5,))
    assert table.room(11) == (6 + 2) * 2 - 11
    assert table.held == ((0, 1, 2, 3, 4, 5), (4, 5))
    table.release()
    assert [pool.num_used for pool in pools] == [0, 0]


def test_needed_counts_what_is_found_and_idle_but_not_what_others_hold() -> None:
    keys = [key(index) for index in range(3)]
    layout = make_layout(2, (0, 20), (2, 20))
    holding, pools = begun_table(layout, 3)
    table = BlockTable(layout, pools)
    assert table.needed(10, 10) == (5, 5)
    assert table.needed(10, 10, keys) == (2, 2)
    holding.release()
    assert table.needed(10, 10, keys) == (5, 3), "of the windowed group one block is still read"


@given(
    block_size=st.integers(1, 4),
    windows=st.lists(st.sampled_from([0, 1, 2, 4, 7, 12]), min_size=1, max_size=3),
    there=st.lists(st.sets(st.integers(0, 7)), min_size=3, max_size=3),
)
def test_a_match_is_the_longest_that_every_group_allows(
    block_size: int, windows: list[int], there: list[set[int]]
) -> None:
    layout = make_layout(block_size, *((window, 8) for window in windows))
    table, pools = make_table(layout)
    for pool, indices in zip(pools, there, strict=False):
        for index, block in zip(indices, pool.allocate(len(indices)), strict=True):
            pool.register(block, key(index))

    def allows(window: int, indices: set[int], count: int) -> bool:
        position = count * block_size  # the next query
        first = max(0, position - window + 1) if window else 0
        return {p // block_size for p in range(first, position)} <= indices

    longest = max(
        count
        for count in range(9)
        if all(allows(w, indices, count) for w, indices in zip(windows, there, strict=False))
    )
    assert table.match([key(index) for index in range(8)]) == longest


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
