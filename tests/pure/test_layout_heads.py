"""Heads: each query head on one rank, with the KV head it reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.errors import LayoutError
from spanwise.layout.heads import HeadShare, kv_index, split_heads


@st.composite
def heads(draw: st.DrawFn) -> tuple[int, int, int]:
    num_kv_heads = draw(st.integers(1, 16))
    num_heads = num_kv_heads * draw(st.integers(1, 8))
    return num_heads, num_kv_heads, draw(st.integers(1, num_heads))


@given(heads())
def test_each_query_head_once_with_its_kv_head(case: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, tp = case
    shares = split_heads(num_heads, num_kv_heads, tp)
    assert len(shares) == tp
    assert [head for share in shares for head in share.query] == list(range(num_heads))
    for share in shares:
        local = kv_index(share, num_heads, num_kv_heads)
        group = num_heads // num_kv_heads
        assert [share.kv[i] for i in local] == [head // group for head in share.query]
        assert set(local) == set(range(len(share.kv)))
        assert local


@given(heads())
def test_kv_heads_are_held_once_unless_ranks_are_more(case: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, tp = case
    held = [head for share in split_heads(num_heads, num_kv_heads, tp) for head in share.kv]
    assert set(held) == set(range(num_kv_heads))
    assert held == sorted(held)
    if tp <= num_kv_heads:
        assert held == list(range(num_kv_heads))


@given(heads())
def test_sizes_differ_by_at_most_one_unit(case: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, tp = case
    unit = num_heads // num_kv_heads if tp <= num_kv_heads else 1
    sizes = [len(share.query) for share in split_heads(num_heads, num_kv_heads, tp)]
    assert max(sizes) - min(sizes) in (0, unit)


def test_heads_by_example() -> None:
    assert [len(share.query) for share in split_heads(8, 8, 3)] == [3, 3, 2]
    assert split_heads(8, 2, 2) == (
        HeadShare(range(0, 4), range(0, 1)),
        HeadShare(range(4, 8), range(1, 2)),
    )
    shares = split_heads(8, 2, 3)
    assert [share.kv for share in shares] == [range(0, 1), range(0, 2), range(1, 2)]
    assert [kv_index(share, 8, 2) for share in shares] == [(0, 0, 0), (0, 1, 1), (0, 0)]


@pytest.mark.parametrize("num_kv_heads", [0, 3])
def test_heads_that_do_not_group_are_refused(num_kv_heads: int) -> None:
    with pytest.raises(LayoutError, match=r"^8 attention heads do not group over \d[^\n]*$"):
        split_heads(8, num_kv_heads, 1)
