"""Fused operations beside the parts of a layer that they stand for, on any device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from spanwise.device import fused_cuda
from spanwise.model.flat import RmsNorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A value may be rounded the other way once; in float32 sums have another order, and 1 + erf(x) is
# what is left of two that are nearly equal.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def strided(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows that stand apart, as parts of a wider product."""
    wide = drawn(*shape[:-1], shape[-1] + 16).to(device, dtype)
    return wide[..., : shape[-1]]


def check_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(
        found.float().cpu(), wanted.float().cpu(), rtol=tolerance, atol=tolerance
    )


def check_norm(shape: tuple[int, ...], dtype: torch.dtype, exact_weight: bool, device: str) -> None:
    hidden = strided(*shape, dtype=dtype, device=device).mul_(3)
    weight = (1 + drawn(shape[-1]) / 2).to(device, torch.float32 if exact_weight else dtype)
    wanted = RmsNorm(weight, 1e-6)
    check_close(fused_cuda.rms_norm(hidden, weight, 1e-6), wanted(hidden))
    if len(shape) == 2:
        residual = drawn(*shape, seed=1).to(device, dtype)
        total, normed = fused_cuda.add_rms_norm(residual, hidden, weight, 1e-6)
        assert torch.equal(total, residual + hidden)
        check_close(normed, wanted(residual + hidden))


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As transformers turns them, from tables ``[tokens, 1, rotated]``."""
    rotated = cos.shape[-1]
    first, rest = heads[..., :rotated], heads[..., rotated:]
    below, above = first.chunk(2, dim=-1)
    first = first * cos + torch.cat((-above, below), dim=-1) * sin
    return torch.cat((first.to(heads.dtype), rest), dim=-1)


def check_rotary(
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    rotated: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    is_signed: bool,
    device: str,
) -> None:
    dtype, table_dtype = dtypes
    num_query, kv_heads = heads
    given = strided(tokens, num_query + 2 * kv_heads, dim, dtype=dtype, device=device)
    angles = drawn(tokens, 1, rotated // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(device, table_dtype), angles.sin().to(device, table_dtype)
    slots = torch.randperm(tokens + 3, generator=torch.Generator().manual_seed(0))[:tokens]
    keys, values = (
        torch.full((tokens + 3, kv_heads, dim), torch.nan, dtype=dtype, device=device)
        for _ in range(2)
    )
    wanted = turned(given[:, : num_query + kv_heads], cos, sin)
    if is_signed:
        below, above = sin.chunk(2, dim=-1)
        sin = torch.cat((-below, above), dim=-1)
    else:
        cos, sin = cos[:, 0], sin[:, 0]
    query = fused_cuda.rotate_and_write(given, cos, sin, slots.to(device), keys, values)
    check_close(query, wanted[:, :num_query])
    check_close(keys.cpu()[slots], wanted[:, num_query:])
    assert torch.equal(values.cpu()[slots], given[:, num_query + kv_heads :].cpu())
    others = torch.ones(tokens + 3, dtype=torch.bool)
    others[slots] = False
    assert keys.cpu()[others].isnan().all() and values.cpu()[others].isnan().all()


def check_gate(rows: int, dim: int, name: str, dtype: torch.dtype, device: str) -> None:
    gate_up = strided(rows, 2 * dim, dtype=dtype, device=device).mul_(4)
    gate_up[0, 0], gate_up[0, 1 % dim] = 300.0, -300.0
    gate, up = gate_up.chunk(2, dim=-1)
    apply = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
    }[name]
    check_close(fused_cuda.gated(gate_up, name), apply(gate) * up)


def check_quantizing(rows: int, dim: int, num_filled: int, device: str) -> None:
    """Bit for bit, zeros and what is no number among the rows."""
    given = strided(rows, dim, dtype=torch.bfloat16, device=device)
    given[0, 0] = torch.nan
    if rows > 2:
        given[1], given[2, dim - 1] = 0.0, torch.inf
    steps, tokens = fused_cuda.quantized(given, num_filled)
    assert steps.shape == (rows, 1) and tokens.shape == (rows, num_filled)
    right_steps, right = fused_cuda._plain_quantized(given.cpu(), num_filled)
    is_number = ~given.isnan().any(1).cpu()  # what its step is, torch and Triton do not agree on
    assert torch.equal(steps.cpu()[is_number], right_steps[is_number])
    found = tokens.cpu().float()
    assert torch.equal(
        found.nan_to_num(500.0)[is_number], right.float().nan_to_num(500.0)[is_number]
    )
    assert bool(found[~is_number].isnan().any(1).all())
    assert not found[:, dim:].any()


def check_rows_alone(dtype: torch.dtype, device: str) -> None:
    """A row has the same bits whatever is beside it."""
    hidden, weight = drawn(5, 96).to(device, dtype), drawn(96).to(device, dtype)
    together = fused_cuda.rms_norm(hidden, weight, 1e-6)
    gates = fused_cuda.gated(hidden, "silu")
    for row in range(5):
        own = hidden[row : row + 1]
        assert torch.equal(fused_cuda.rms_norm(own, weight, 1e-6)[0], together[row])
        assert torch.equal(fused_cuda.gated(own, "silu")[0], gates[row])


NORM_SHAPES = [(1, 64), (3, 48), (2, 1), (5, 37), (4, 1000), (1, 5000), (3, 5, 16), (2, 1, 40)]
ROTARY_CASES = [
    (1, (4, 1), 8, 8),
    (3, (8, 4), 64, 64),
    (5, (5, 5), 16, 12),
    (2, (14, 2), 128, 128),
    (7, (3, 1), 80, 32),
    (2, (1, 1), 6, 6),
]
GATE_CASES = [(1, 64), (3, 37), (2, 1), (4, 1100)]

QUANTIZE_CASES = [(1, 64, 64), (3, 37, 48), (4, 1, 16), (5, 1100, 1104), (300, 192, 192)]

norms = pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
rotaries = pytest.mark.parametrize(("tokens", "heads", "dim", "rotated"), ROTARY_CASES)
gates = pytest.mark.parametrize(("rows", "dim"), GATE_CASES)
quantizings = pytest.mark.parametrize(("rows", "dim", "num_filled"), QUANTIZE_CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
