"""Packed linears: the right numbers, the same bits for every batch and every cut."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from spanwise.device.activations import activation_name
from spanwise.device.linear import (
    JoinedGate,
    PackedGate,
    PackedLinear,
    PlainLinear,
    can_pack,
    fill_rows,
    make_linear,
    num_filled_rows,
)

COUNTS = (1, 2, 3, 7, 8, 16, 32, 33, 64, 130)


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def dtypes() -> list[torch.dtype]:
    both = (torch.float32, torch.bfloat16)
    return [dtype for dtype in both if can_pack(torch.empty(1, 1, dtype=dtype))]


@pytest.fixture(params=dtypes(), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    given: torch.dtype = request.param
    return given


@torch.inference_mode()
@pytest.mark.parametrize("has_bias", [True, False])
def test_gives_what_a_plain_linear_gives(dtype: torch.dtype, has_bias: bool) -> None:
    weight, hidden = drawn(37, 48, dtype=dtype), drawn(5, 48, dtype=dtype)
    bias = drawn(37, dtype=dtype) if has_bias else None
    packed = PackedLinear(weight, bias)
    exact = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (packed(hidden).double() - exact).abs().max() <= 2 * rounding
    assert packed.num_bytes == weight.nbytes


def exact_dtypes() -> list[torch.dtype]:
    """Where AMX multiplies, a bfloat16 row's last bit may depend on its place in a tile of rows."""
    has_amx = torch.cpu._is_amx_tile_supported()
    return [dtype for dtype in dtypes() if dtype == torch.float32 or not has_amx]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", exact_dtypes(), ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (1792, 1280), (131, 48)])
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    packed = PackedLinear(drawn(*shape, dtype=dtype), drawn(shape[0], dtype=dtype))
    hidden = drawn(max(COUNTS), shape[1], dtype=dtype)
    whole = packed(hidden)
    for count in COUNTS:
        assert torch.equal(packed(hidden[:count]), whole[:count]), count


@torch.inference_mode()
def test_columns_are_the_same_in_every_cut(dtype: torch.dtype) -> None:
    weight, hidden = drawn(1792, 320, dtype=dtype), drawn(8, 320, dtype=dtype)
    cuts = [PackedLinear(part, None) for part in weight.split([1280, 256, 256])]
    parts = torch.cat([cut(hidden) for cut in cuts], dim=-1)
    assert torch.equal(parts, PackedLinear(weight, None)(hidden))


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(0, 48), (1, 0, 48), (1, 1, 48), (1, 6, 48), (48,)])
def test_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = drawn(37, 48, dtype=dtype)
    hidden = drawn(*shape, dtype=dtype)
    given, wanted = PackedLinear(weight, None)(hidden), F.linear(hidden, weight)
    assert given.shape == wanted.shape and given.dtype == dtype


def test_kernels_are_compiled_for_few_numbers_of_rows() -> None:
    filled = [num_filled_rows(count) for count in range(1, 2049)]
    assert filled[:17] == [2, 2, 4, 4, *[8] * 4, *[16] * 8, 32]
    assert all(count <= more for count, more in enumerate(filled, 1))
    assert all(more <= max(count + 15, 1.125 * count) for count, more in enumerate(filled, 1))
    assert all(num_filled_rows(more) == more for more in filled)
    assert len(set(filled[:512])) == 27


def test_what_cannot_be_packed_stays_as_it_is() -> None:
    weight = drawn(3, 4, dtype=torch.float64)
    assert isinstance(make_linear(weight, None), PlainLinear)
    hidden = drawn(2, 4, dtype=torch.float64)
    assert torch.equal(make_linear(weight, None)(hidden), hidden @ weight.t())


def test_serves_in_a_fork(dtype: torch.dtype) -> None:
    packed, hidden = PackedLinear(drawn(96, 64, dtype=dtype), None), drawn(4, 64, dtype=dtype)
    wanted = packed(hidden)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(packed(hidden), wanted) else 1)
    assert os.waitpid(pid, 0)[1] == 0


ACTIVATIONS = {
    "silu": torch.nn.SiLU(),
    "gelu": torch.nn.GELU(),
    "gelu tanh": torch.nn.GELU(approximate="tanh"),
    "relu": torch.nn.ReLU(),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 37])
def test_a_packed_gate_is_a_joined_one(dtype: torch.dtype, name: str, num_rows: int) -> None:
    activation = ACTIVATIONS[name]
    name = activation_name(activation)
    assert name is not None
    weights, biases = drawn(2 * 48, 32, dtype=dtype).chunk(2), drawn(2 * 48, dtype=dtype).chunk(2)
    gate, up = (PackedLinear(*parts) for parts in zip(weights, biases, strict=True))
    joined = JoinedGate(PlainLinear(torch.cat(weights), torch.cat(biases)), activation)
    hidden = drawn(num_rows, 32, dtype=dtype)
    found, wanted = PackedGate(gate, up, name)(hidden), joined(hidden)
    assert found.shape == wanted.shape
    # Three roundings, one of them before the two factors are multiplied.
    rounding = torch.finfo(dtype).eps * wanted.abs().max()
    assert (found - wanted).abs().max() <= 4 * rounding


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [0, 1, 5, 16, 37])
def test_a_residual_is_added(dtype: torch.dtype, num_rows: int) -> None:
    packed = PackedLinear(drawn(48, 32, dtype=dtype), drawn(48, dtype=dtype))
    hidden, residual = drawn(num_rows, 32, dtype=dtype), drawn(num_rows, 48, dtype=dtype)
    found, wanted = packed.add_to(residual, hidden), residual + packed(hidden)
    assert found.shape == wanted.shape
    if num_rows:
        rounding = torch.finfo(dtype).eps * wanted.abs().max()
        assert (found - wanted).abs().max() <= 2 * rounding
    if dtype == torch.float32:
        assert torch.equal(found, wanted)


def test_an_activation_that_onednn_does_not_have() -> None:
    assert activation_name(torch.nn.Softsign()) is None
    assert activation_name(lambda x: torch.nn.functional.silu(x).clamp(max=20.0)) is None
    assert activation_name(torch.nn.SiLU()) != activation_name(torch.nn.GELU())


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1792, 1280), (131, 48)])
def test_what_follows_a_product_depends_on_no_other_row(shape: tuple[int, int]) -> None:
    packed = PackedLinear(drawn(*shape, dtype=torch.float32), None)
    hidden = drawn(max(COUNTS), shape[1], dtype=torch.float32)
    other = drawn(max(COUNTS), shape[0], dtype=torch.float32)
    name = activation_name(torch.nn.SiLU())
    assert name is not None
    for count in COUNTS:
        rows, others = hidden[:count], other[:count]
        assert torch.equal(packed.activated(rows, name), packed.activated(hidden, name)[:count])
        assert torch.equal(packed.times(others, rows), packed.times(other, hidden)[:count])
        assert torch.equal(packed.add_to(others, rows), packed.add_to(other, hidden)[:count])


def test_filled_rows_are_zeros_and_stay_so() -> None:
    rows = drawn(5, 7, dtype=torch.float32)
    filled = fill_rows(rows)
    assert filled.shape == (8, 7) and torch.equal(filled[:5], rows) and not filled[5:].any()
    filled[5:] = 1.0
    assert not fill_rows(rows)[5:].any()
    assert fill_rows(filled) is filled
