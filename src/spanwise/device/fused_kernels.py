# Triton comes with torch's builds for cards, and without types.
# mypy: disallow-untyped-decorators=False
# ruff: noqa: N803
"""The Triton kernels of ``fused_cuda``, which is the only one to import this.

A row's program sees nothing of other rows, and the number of rows is no argument: one compiled
kernel serves a layer whatever the batch. Where strides let Triton load several values at once, they
do so for every row, so that a row is summed in one order in each batch.

Values are rounded to the type of the tensors where the torch operations round.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from triton.errors import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    TritonError,
)

__all__ = ["TritonError", "gate_rows", "norm_rows", "quantize_rows", "rotate_and_write"]


@triton.jit
def norm_rows(
    hidden: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    heads: tl.tensor,
    hidden_row: tl.tensor,
    hidden_head: tl.tensor,
    residual_row: tl.tensor,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WEIGHT_LAST: tl.constexpr,
) -> None:
    """One row, or one of its heads: to ``out``, dense; its sum with the residual to ``total``.

    ``WEIGHT_LAST``: the weight comes after the rounding.
    """
    program = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK)
    inside = dim < DIM
    row, head = program // heads, program % heads
    values = tl.load(hidden + row * hidden_row + head * hidden_head + dim, mask=inside, other=0.0)
    exact = values.to(tl.float32)
    if HAS_RESIDUAL:
        before = tl.load(residual + row * residual_row + dim, mask=inside, other=0.0)
        values = (exact + before.to(tl.float32)).to(values.dtype)
        tl.store(total + program * DIM + dim, values, mask=inside)
        exact = values.to(tl.float32)
    size = tl.sum(exact * exact, 0)
    normed = exact * tl.rsqrt(size / DIM + eps)
    scale = tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT_LAST:
        normed = normed.to(values.dtype).to(tl.float32)
    tl.store(out + program * DIM + dim, (normed * scale).to(values.dtype), mask=inside)


@triton.jit
def rotate_and_write(
    heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    query: tl.tensor,
    heads_row: tl.tensor,
    heads_head: tl.tensor,
    cos_row: tl.tensor,
    sin_row: tl.tensor,
    key_slot: tl.tensor,
    key_head: tl.tensor,
    value_slot: tl.tensor,
    value_head: tl.tensor,
    NUM_QUERY: tl.constexpr,
    NUM_KV: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> None:
    """Some heads of one token: the queries to ``query``, keys and values to the token's slot.

    ``HALF`` of what is rotated; what is beyond both halves stays as it is. ``ROUNDS``: the first
    product is rounded, as torch does where tables are of the heads' type.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    slot = tl.load(slots + token)
    is_key = (head >= NUM_QUERY) & (head < NUM_QUERY + NUM_KV)
    is_value = (head >= NUM_QUERY + NUM_KV) & (head < NUM_QUERY + 2 * NUM_KV)
    own = heads + token * heads_row + head[:, None] * heads_head
    # Where each head goes, whatever it is; the masks say which of the three it is.
    to_query = query + (token * NUM_QUERY + head[:, None]) * DIM
    to_key = keys + slot * key_slot + (head[:, None] - NUM_QUERY) * key_head
    to_value = values + slot * value_slot + (head[:, None] - NUM_QUERY - NUM_KV) * value_head

    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    known = (head < NUM_QUERY + 2 * NUM_KV)[:, None] & in_half[None, :]
    lower = tl.load(own + half[None, :], mask=known, other=0.0)
    upper = tl.load(own + HALF + half[None, :], mask=known, other=0.0)
    # Halves share their angles; some tables have the sines of the first one negative.
    cosine, sine = cos + token * cos_row + HALF + half, sin + token * sin_row + HALF + half
    cosine = tl.load(cosine, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sine, mask=in_half, other=0.0).to(tl.float32)[None, :]
    below, above = lower.to(tl.float32), upper.to(tl.float32)
    kept_below, kept_above = below * cosine, above * cosine
    if ROUNDS:
        kept_below = kept_below.to(lower.dtype).to(tl.float32)
        kept_above = kept_above.to(lower.dtype).to(tl.float32)
    new_lower = (kept_below - above * sine).to(lower.dtype)
    new_upper = (kept_above + below * sine).to(lower.dtype)

    at = half[None, :]
    mask = (head < NUM_QUERY)[:, None] & in_half[None, :]
    tl.store(to_query + at, new_lower, mask=mask)
    tl.store(to_query + HALF + at, new_upper, mask=mask)
    mask = is_key[:, None] & in_half[None, :]
    tl.store(to_key + at, new_lower, mask=mask)
    tl.store(to_key + HALF + at, new_upper, mask=mask)
    mask = is_value[:, None] & in_half[None, :]
    tl.store(to_value + at, lower, mask=mask)
    tl.store(to_value + HALF + at, upper, mask=mask)

    if DIM > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        in_rest = rest < DIM
        known = (head < NUM_QUERY + 2 * NUM_KV)[:, None] & in_rest
        others = tl.load(own + rest, mask=known, other=0.0)
        tl.store(to_query + rest, others, mask=(head < NUM_QUERY)[:, None] & in_rest)
        tl.store(to_key + rest, others, mask=is_key[:, None] & in_rest)
        tl.store(to_value + rest, others, mask=is_value[:, None] & in_rest)


@triton.jit
def gate_rows(
    gate_up: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """Some columns of one row: ``activation(gate) * up``, the gates before the ups."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < DIM
    own = gate_up + row * row_stride + column
    gate = tl.load(own, mask=inside, other=0.0)
    up = tl.load(own + DIM, mask=inside, other=0.0)
    exact = gate.to(tl.float32)
    if ACTIVATION == "silu":
        # By the exponential that cannot overflow, as below.
        small = tl.exp(-tl.abs(exact))
        active = exact * tl.where(exact < 0, small, 1.0) / (1.0 + small)
    elif ACTIVATION == "gelu":
        active = 0.5 * exact * (1.0 + tl.erf(exact * 0.7071067811865476))
    elif ACTIVATION == "gelu-tanh":
        inner = 0.7978845608028654 * (exact + 0.044715 * exact * exact * exact)
        small = tl.exp(-2.0 * tl.abs(inner))
        size = (1.0 - small) / (1.0 + small)
        active = 0.5 * exact * (1.0 + tl.where(inner < 0, -size, size))
    else:
        tl.static_assert(ACTIVATION == "relu")
        # As torch does: what is not a number stays none.
        active = tl.where(exact < 0, 0.0, exact)
    product = active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * DIM + column, product.to(gate.dtype), mask=inside)


@triton.jit
def quantize_rows(
    rows: tl.tensor,
    steps: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    DIM: tl.constexpr,
    FILLED: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
) -> None:
    """One row in steps of its own, its largest number at ``LARGEST``; zeros up to ``FILLED``.

    Divisions are those of IEEE 754, as torch's are.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exact = tl.load(rows + row * row_stride + column, mask=column < DIM, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(exact), 0)
    step = tl.maximum(tl.div_rn(absmax, LARGEST), TINY)
    tl.store(steps + row, step)
    tokens = tl.div_rn(exact, step).to(out.dtype.element_ty)
    tl.store(out + row * FILLED + column, tokens, mask=column < FILLED)
