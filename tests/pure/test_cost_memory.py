from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.cost.blocks import peak_blocks
from spanwise.cost.memory import (
    CacheWish,
    RankMemory,
    arena_bytes,
    cache_groups,
    size_cache,
    token_bytes,
)
from spanwise.errors import DeviceError
from spanwise.scheduler.block_table import max_positions
from spanwise.types.cache import CacheGroup, CacheLayout, LayerCache

FULL = LayerCache("full", 4, 16, 16)
WINDOW = LayerCache("window", 4, 16, 16, 8)
LATENT = LayerCache("latent", 1, 512, 64)


def rank(available: int, *caches: LayerCache, first: int = 0) -> RankMemory:
    return RankMemory(
        name="cpu:0",
        layer_caches=dict(enumerate(caches, first)),
        value_bytes=2,
        available_bytes=available,
    )


def wish(**changes: int) -> CacheWish:
    base = {"block_size": 4, "max_num_seqs": 4, "max_model_len": 64, "max_step_tokens": 16}
    return CacheWish(**(base | changes))


def test_a_latent_is_counted_once_and_not_per_head() -> None:
    assert token_bytes(LATENT, 2) == (512 + 64) * 2
    assert token_bytes(FULL, 2) == 4 * 32 * 2


def test_layers_with_one_window_share_a_group() -> None:
    assert cache_groups([WINDOW, FULL, WINDOW, LATENT]) == {8: (0, 2), 0: (1, 3)}


def test_arena_counts_the_ranks_own_layers_only() -> None:
    layout = CacheLayout(4, (CacheGroup((0, 1), 0, 10),))
    assert arena_bytes({1: FULL}, 2, layout) == 10 * 4 * token_bytes(FULL, 2)


def test_the_smallest_rank_decides() -> None:
    per_block = 4 * token_bytes(FULL, 2)
    ranks = [rank(per_block * 40, FULL), rank(per_block * 20, FULL, first=1)]
    assert size_cache([FULL, FULL], ranks, wish()).groups[0].num_blocks == 20


def test_no_more_than_could_ever_be_used() -> None:
    layout = size_cache([FULL], [rank(1 << 40, FULL)], wish())
    assert layout.groups[0].num_blocks == 4 * 64 // 4


def test_too_little_memory_says_how_much_is_missing() -> None:
    with pytest.raises(DeviceError, match=r"cpu:0 has 0\.1 KiB .* 64 tokens takes") as error:
        size_cache([FULL], [rank(100, FULL)], wish())
    assert "\n" not in str(error.value)


@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 200),
    st.integers(1, 64),
    st.integers(1, 16),
    st.integers(1, 4000),
)
def test_whatever_is_sized_runs_one_longest_sequence_and_fits(
    window: int, seqs: int, length: int, step: int, block: int, blocks: int
) -> None:
    caches = [FULL, LayerCache("window", 4, 16, 16, window)]
    asked = wish(block_size=block, max_num_seqs=seqs, max_model_len=length, max_step_tokens=step)
    memory = rank(blocks * block * token_bytes(FULL, 2), *caches)
    try:
        layout = size_cache(caches, [memory], asked)
    except DeviceError:
        return
    assert arena_bytes(memory.layer_caches, 2, layout) <= memory.available_bytes
    assert max_positions(layout) >= length
    windowed = next(group for group in layout.groups if group.window)
    assert windowed.num_blocks >= peak_blocks(windowed, block, length, min(step, length))
