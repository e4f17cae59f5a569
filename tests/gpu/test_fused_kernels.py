"""On a card the fused kernels give what a layer's own parts give there, and are taken.

``tests/cpu/test_fused_kernels.py`` runs the same in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from tests.support import fused
from tests.support.fused import dtypes, gates, norms, quantizings, rotaries

from spanwise.device.fused_cuda import ACTIVATIONS, GateKind, NormKind, RotaryKind, _serves

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)


@norms
@dtypes
@pytest.mark.parametrize("exact_weight", [False, True])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, exact_weight: bool) -> None:
    fused.check_norm(shape, dtype, exact_weight, "cuda:0")


@rotaries
@dtypes
@pytest.mark.parametrize("has_exact_tables", [False, True])
@pytest.mark.parametrize("is_signed", [False, True])
def test_rotary_positions(
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    rotated: int,
    dtype: torch.dtype,
    has_exact_tables: bool,
    is_signed: bool,
) -> None:
    kinds = (dtype, torch.float32 if has_exact_tables else dtype)
    fused.check_rotary(tokens, heads, dim, rotated, kinds, is_signed, "cuda:0")


@gates
@dtypes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates(rows: int, dim: int, name: str, dtype: torch.dtype) -> None:
    fused.check_gate(rows, dim, name, dtype, "cuda:0")


@quantizings
def test_quantizing(rows: int, dim: int, num_filled: int) -> None:
    fused.check_quantizing(rows, dim, num_filled, "cuda:0")


@dtypes
def test_a_row_is_the_same_alone(dtype: torch.dtype) -> None:
    fused.check_rows_alone(dtype, "cuda:0")


@dtypes
def test_kernels_are_taken(dtype: torch.dtype) -> None:
    assert _serves(NormKind(CARD, dtype, dtype, 4096, 2, True))
    assert _serves(NormKind(CARD, dtype, torch.float32, 128, 3, False))
    assert _serves(RotaryKind(CARD, dtype, dtype, 32, 8, 128, 128))
    assert all(_serves(GateKind(CARD, dtype, 14336, name)) for name in ACTIVATIONS)
