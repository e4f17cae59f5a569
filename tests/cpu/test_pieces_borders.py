"""Borders lie where little is carried, and never too close."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spanwise.model.borders import MAX_PIECES, choose_borders

# What is carried before each operation of a transformer's block, and what the operations cost.
CARRIED = [1, 2, 4, 2, 2, 1, 2, 5, 5, 2]
FLOPS = [0, 3, 1, 1, 0, 0, 4, 0, 4, 0]


def blocks(num_blocks: int) -> tuple[list[int | None], list[float]]:
    carried: list[int | None] = [*CARRIED * num_blocks]
    return carried[1:], [float(flops) for flops in FLOPS * num_blocks]


def test_blocks_are_cut_at_their_residuals() -> None:
    carried, flops = blocks(12)
    borders = choose_borders(carried, flops, flops)
    assert {carried[border - 1] for border in borders} == {1}
    assert len(borders) == 2 * 12 - 1


def test_very_many_blocks_share_pieces() -> None:
    carried, flops = blocks(200)
    borders = choose_borders(carried, flops, flops)
    assert MAX_PIECES // 2 <= len(borders) < MAX_PIECES
    assert {carried[border - 1] for border in borders} == {1}


def test_a_plain_chain_is_cut_everywhere_after_what_only_passes() -> None:
    layer_and_activation = [1.0, 0.0] * 10
    borders = choose_borders([7] * 19, layer_and_activation, layer_and_activation)
    assert borders == list(range(2, 20, 2))


def test_a_table_without_flops_is_a_piece_by_its_weight() -> None:
    assert choose_borders([5, 5], [0.0, 1.0, 1.0], [8.0, 1.0, 1.0]) == [1, 2]


def test_what_cannot_be_cut_is_not() -> None:
    assert choose_borders([None, 5, None], [1.0] * 4, [1.0] * 4) == [2]
    assert choose_borders([], [1.0], [0.0]) == []
    assert choose_borders([], [], []) == []


@given(st.data())
def test_any_program_is_cut_into_few_pieces(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 300))
    amounts = st.lists(st.integers(0, 9).map(float), min_size=num, max_size=num)
    flops, weights = data.draw(amounts), data.draw(amounts)
    places = st.lists(st.none() | st.integers(0, 20), min_size=num - 1, max_size=num - 1)
    carried = data.draw(places)
    borders = choose_borders(carried, flops, weights)
    assert borders == sorted({*borders})
    assert len(borders) < MAX_PIECES
    assert all(carried[border - 1] is not None for border in borders)
    assert borders == choose_borders(carried, flops, weights)
