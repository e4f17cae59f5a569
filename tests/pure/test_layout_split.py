"""Splits: every unit owned once, in order; even ones even, weighted ones the best there is."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spanwise.errors import LayoutError
from spanwise.layout.split import split_by_weight, split_evenly
from spanwise.layout.units import column_shares


def owned(shares: tuple[range, ...]) -> list[int]:
    return [unit for share in shares for unit in share]


def heaviest_and_squares(
    shares: tuple[range, ...], weights: list[int], loads: list[int]
) -> tuple[int, int]:
    sums = [
        sum(weights[i] for i in share) + load for share, load in zip(shares, loads, strict=True)
    ]
    return max(sums), sum(total**2 for total in sums)


def brute_force(weights: list[int], loads: list[int]) -> tuple[int, int]:
    results = []
    for cuts in combinations(range(1, len(weights)), len(loads) - 1):
        borders = [0, *cuts, len(weights)]
        shares = tuple(range(a, b) for a, b in pairwise(borders))
        results.append(heaviest_and_squares(shares, weights, loads))
    return min(results)


@given(st.integers(0, 500), st.integers(1, 60))
def test_even_split_owns_each_unit_once_and_sizes_differ_by_one(total: int, parts: int) -> None:
    shares = split_evenly(total, parts)
    sizes = [len(share) for share in shares]
    assert owned(shares) == list(range(total))
    assert len(shares) == parts
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_even_split_by_example() -> None:
    assert split_evenly(8, 3) == (range(0, 3), range(3, 6), range(6, 8))
    assert [len(share) for share in split_evenly(2, 4)] == [1, 1, 0, 0]


@st.composite
def weighted(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    weights = draw(st.lists(st.integers(0, 30), min_size=1, max_size=9))
    parts = draw(st.integers(1, len(weights)))
    return weights, draw(st.lists(st.integers(0, 40), min_size=parts, max_size=parts))


@given(weighted())
@example(([1] * 7, [0] * 5))
def test_weighted_split_equals_brute_force(case: tuple[list[int], list[int]]) -> None:
    weights, loads = case
    shares = split_by_weight(weights, len(loads), loads)
    assert owned(shares) == list(range(len(weights)))
    assert all(shares)
    assert heaviest_and_squares(shares, weights, loads) == brute_force(weights, loads)


@given(st.integers(1, 40), st.data())
def test_equal_weights_split_evenly(total: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, total))
    assert split_by_weight([7] * total, parts) == split_evenly(total, parts)


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=12), st.data())
def test_float_weights_own_each_item_once(weights: list[float], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(weights)))
    shares = split_by_weight(weights, parts)
    assert owned(shares) == list(range(len(weights)))
    assert all(shares)


def test_loads_move_the_border() -> None:
    assert split_by_weight([1] * 12, 2) == (range(0, 6), range(6, 12))
    assert split_by_weight([1] * 12, 2, [2, 0]) == (range(0, 5), range(5, 12))
    assert split_by_weight([1] * 12, 3, [3, 0, 3]) == (range(0, 3), range(3, 9), range(9, 12))


@pytest.mark.parametrize("parts", [0, 4])
def test_more_parts_than_items_is_one_line(parts: int) -> None:
    with pytest.raises(LayoutError, match=r"^3 items cannot be split into \d parts[^\n]*$"):
        split_by_weight([1, 1, 1], parts)


@given(st.integers(0, 64), st.integers(1, 12), st.integers(1, 64))
def test_columns_are_dealt_in_whole_units(units: int, parts: int, unit: int) -> None:
    shares = column_shares(units * unit, parts, unit)
    sizes = [len(share) for share in shares]
    assert owned(shares) == list(range(units * unit))
    assert all(share.start % unit == 0 for share in shares)
    assert max(sizes) - min(sizes) in (0, unit)


def test_columns_that_do_not_fill_units_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"^100 columns cannot be dealt in units of 32[^\n]*$"):
        column_shares(100, 2, 32)
