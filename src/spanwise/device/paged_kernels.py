# Triton comes with torch's builds for cards, and without types.
# mypy: disallow-untyped-decorators=False
# ruff: noqa: N803
"""The Triton kernels of ``paged_attention``, which is the only one to import this.

A row's programs see nothing of other rows, and everything that differs from batch to batch is kept
out of what Triton compiles for: one compiled kernel serves a layer whatever the batch, so a row
has the same bits in each, and nothing is compiled again while requests run.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from triton.errors import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    TritonError,
)

__all__ = ["TritonError", "attend_split", "join_splits"]


@triton.jit
def split_length(count: tl.tensor, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr) -> tl.tensor:
    """How many keys each split of a row of ``count`` keys has, the last one fewer."""
    return (count + SPLIT * MAX_SPLITS - 1) // (SPLIT * MAX_SPLITS) * SPLIT


@triton.jit(
    do_not_specialize=["query_row", "query_head", "query_group", "slots_row", "splits"],
    do_not_specialize_on_alignment=["query", "slots", "counts"],
)
def attend_split(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    totals: tl.tensor,
    maxima: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    query_group: tl.tensor,
    key_slot: tl.tensor,
    key_head: tl.tensor,
    value_slot: tl.tensor,
    value_head: tl.tensor,
    slots_row: tl.tensor,
    splits: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> None:
    """One KV head's queries of one row over one split of its keys.

    Writes ``sums`` ``[rows, kv_heads, splits, group, value_dim]``, values weighted by
    ``exp(score - maximum)``; ``totals``, of those weights; and ``maxima``.
    """
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    count = tl.load(counts + row).to(tl.int32)
    length = split_length(count, SPLIT, MAX_SPLITS)
    begin = split * length
    if begin >= count:
        return
    end = tl.minimum(begin + length, count)

    group = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    value_dim = tl.arange(0, BLOCK_VALUE)
    place = tl.arange(0, BLOCK_KEYS)
    in_group, in_dim, in_value = group < GROUP, dim < DIM, value_dim < VALUE_DIM

    own_query = query + row * query_row + head * query_head
    queries = tl.load(
        own_query + group[:, None] * query_group + dim[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    own_slots = slots + row * slots_row
    own_keys = keys + head * key_head + dim[:, None]
    own_values = values + head * value_head + value_dim[None, :]
    maximum = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    summed = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
    for at in range(begin, end, BLOCK_KEYS):
        here = at + place < end
        slot = tl.load(own_slots + at + place, mask=here, other=0)
        # [dim, keys]: beyond the row's end nothing is read, since it might not be a number.
        key = tl.load(
            own_keys + slot[None, :] * key_slot, mask=in_dim[:, None] & here[None, :], other=0.0
        )
        # TF32 would not be float32; for the other types it changes nothing.
        scores = tl.dot(queries, key, input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            # tanh, by the exponential that cannot overflow.
            small = tl.exp(-2.0 * tl.abs(scores) / softcap)
            capped = softcap * (1.0 - small) / (1.0 + small)
            scores = tl.where(scores < 0, -capped, capped)
        scores = tl.where(here[None, :], scores, float("-inf"))
        # A block has one key at least, so that this is a number.
        largest = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp(scores - largest[:, None])
        shrink = tl.exp(maximum - largest)
        value = tl.load(
            own_values + slot[:, None] * value_slot,
            mask=here[:, None] & in_value[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, 1)
        product = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        summed = summed * shrink[:, None] + product
        maximum = largest

    own = ((row * KV_HEADS + head) * splits + split) * GROUP + group
    tl.store(totals + own, total, mask=in_group)
    tl.store(maxima + own, maximum, mask=in_group)
    tl.store(
        sums + own[:, None] * VALUE_DIM + value_dim[None, :],
        summed,
        mask=in_group[:, None] & in_value[None, :],
    )


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["counts"])
def join_splits(
    sums: tl.tensor,
    totals: tl.tensor,
    maxima: tl.tensor,
    counts: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    splits: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> None:
    """One query head of one row, its splits and its sink: to ``out`` ``[rows, heads, value_dim]``.

    Always over ``MAX_SPLITS`` places, so that the sum has one order however long other rows are.
    """
    heads: tl.constexpr = KV_HEADS * GROUP
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    count = tl.load(counts + row).to(tl.int32)
    split = tl.arange(0, MAX_SPLITS)
    here = split * split_length(count, SPLIT, MAX_SPLITS) < count
    own = ((row * KV_HEADS + head // GROUP) * splits + split) * GROUP + head % GROUP
    maximum = tl.load(maxima + own, mask=here, other=float("-inf"))
    total = tl.load(totals + own, mask=here, other=0.0)
    largest = tl.max(maximum, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        largest = tl.maximum(largest, sink)
    scale = tl.exp(maximum - largest)
    whole = tl.sum(total * scale, 0)
    if HAS_SINKS:
        whole += tl.exp(sink - largest)
    value_dim = tl.arange(0, BLOCK_VALUE)
    in_value = value_dim < VALUE_DIM
    parts = tl.load(
        sums + own[:, None] * VALUE_DIM + value_dim[None, :],
        mask=here[:, None] & in_value[None, :],
        other=0.0,
    )
    result = tl.sum(parts * scale[:, None], 0) / whole
    place = out + (row * heads + head) * VALUE_DIM + value_dim
    tl.store(place, result.to(out.dtype.element_ty), mask=in_value)
