"""Attention of many sequences' last token on a card, over keys and values where they lie.

``attend_decodes`` needs each row's history gathered first, which reads and writes it once more. Our
own Triton kernel reads it by its slots. As in Flash-Decoding (FlashAttention's, arXiv:2205.14135,
with the keys of one query split over programs) a second kernel joins the splits. Triton comes with
torch's builds for cards; nothing of it is imported elsewhere.
"""

from __future__ import annotations

import logging
import subprocess
from dataclasses import dataclass
from functools import cache

import torch

from spanwise.device.attention import AttentionRule, attend_decodes, mask_of
from spanwise.errors import reason

# A row's keys go to splits of this many, or of the least multiple that makes at most MAX_SPLITS:
# enough programs for a card from one long row, and, with 8 query heads to a KV head in bfloat16,
# partial sums of 1/16 of the bytes that are read. Not tuned on a card yet.
SPLIT_KEYS = 128
MAX_SPLITS = 32
# Of keys and values at a time. Twice that fits the shared memory of every card since Ampere.
_TILE_BYTES = 32 << 10
_MOST_TILE_KEYS = 64
_LEAST_TILE = 16  # what a product on tensor cores takes in each dim
# Of the largest value, what another order of sums may change; TF32 would miss that of float32.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerKind:
    """What the kernel is compiled for, and checked for once."""

    device: torch.device
    dtype: torch.dtype
    kv_heads: int
    group: int
    dim: int
    value_dim: int
    rule: AttentionRule
    has_sinks: bool


def reads_in_place(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rule: AttentionRule,
    sinks: torch.Tensor | None = None,
) -> bool:
    """Whether ``paged_decode`` serves for such a layer: on a card, where it has proved right.

    The first layer of a kind waits for the check; no later one does.
    """
    if keys.device.type != "cuda" or rule.kv_index is not None:
        return False
    _, kv_heads, group, dim = query.shape
    plain = AttentionRule(rule.scaling, softcap=rule.softcap)
    shape = (kv_heads, group, dim, values.shape[2])
    return _serves(LayerKind(keys.device, keys.dtype, *shape, plain, sinks is not None))


def paged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    rule: AttentionRule,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last token of many sequences, ``query`` ``[rows, kv_heads, group, dim]``.

    ``keys`` ``[slots, kv_heads, dim]``, ``values`` ``[slots, kv_heads, value_dim]``: the layer's
    pages. Row i reads ``slots[i, :counts[i]]`` of ``slots`` ``[rows, length]``, one at least, and
    never the rest; both int64. ``sinks`` ``[heads]`` as for ``attend_chunk``. Sums are in float32.
    Rows of any lengths may go together, and a row's bits do not depend on which. Waits for
    nothing. Returns ``[rows, kv_heads, group, value_dim]``.
    """
    from spanwise.device import paged_kernels

    rows, kv_heads, group, dim = query.shape
    value_dim = values.shape[2]
    assert query.dtype == keys.dtype == values.dtype, "the cache holds what the model computes in"
    assert rule.kv_index is None, "query heads stand with the KV head they read"
    query, slots = _with_dense_rows(query), _with_dense_rows(slots)
    keys, values = _with_dense_rows(keys), _with_dense_rows(values)
    splits = min(MAX_SPLITS, -(-slots.shape[1] // SPLIT_KEYS))
    partial = (rows, kv_heads, splits, group)
    totals, maxima, sums = (
        torch.empty(shape, dtype=torch.float32, device=query.device)
        for shape in (partial, partial, (*partial, value_dim))
    )
    out = torch.empty((rows, kv_heads, group, value_dim), dtype=query.dtype, device=query.device)
    tile = _tile(group, dim, value_dim, query.element_size())
    paged_kernels.attend_split[(rows * kv_heads, splits)](
        *(query, keys, values, slots, counts, sums, totals, maxima),
        *(float(rule.scaling), float(rule.softcap or 1.0)),
        *query.stride()[:3],
        *keys.stride()[:2],
        *values.stride()[:2],
        *(slots.stride(0), splits),
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_GROUP=tile.group,
        BLOCK_DIM=tile.dim,
        BLOCK_VALUE=tile.value_dim,
        BLOCK_KEYS=tile.keys,
        HAS_SOFTCAP=bool(rule.softcap),
        SPLIT=SPLIT_KEYS,
        MAX_SPLITS=MAX_SPLITS,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    paged_kernels.join_splits[(rows * kv_heads * group,)](
        *(sums, totals, maxima, counts, totals if sinks is None else sinks, out, splits),
        KV_HEADS=kv_heads,
        GROUP=group,
        VALUE_DIM=value_dim,
        BLOCK_VALUE=tile.value_dim,
        HAS_SINKS=sinks is not None,
        SPLIT=SPLIT_KEYS,
        MAX_SPLITS=MAX_SPLITS,
        num_warps=4,
    )
    return out


def _with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dim is dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@dataclass(frozen=True)
class _Tile:
    """What one program holds at a time; powers of two."""

    group: int
    dim: int
    value_dim: int
    keys: int
    warps: int
    stages: int


@cache
def _tile(group: int, dim: int, value_dim: int, value_bytes: int) -> _Tile:
    group, dim, value_dim = (_padded(size) for size in (group, dim, value_dim))
    key_bytes = (dim + value_dim) * value_bytes
    fitting = 1 << ((_TILE_BYTES // key_bytes).bit_length() - 1)
    keys = min(_MOST_TILE_KEYS, max(_LEAST_TILE, fitting))
    # Loads run ahead by one tile where two fit.
    stages = 2 if keys * key_bytes <= _TILE_BYTES else 1
    warps = 8 if group * value_dim > 1 << 13 else 4
    return _Tile(group, dim, value_dim, keys, warps, stages)


def _padded(size: int) -> int:
    return max(_LEAST_TILE, 1 << (size - 1).bit_length())


# -- the check ------------------------------------------------------------------------------------


@cache
def _serves(kind: LayerKind) -> bool:
    """Whether the kernel can be built here and gives what ``attend_decodes`` does."""
    fault = _fault(kind)
    if not fault:
        return True
    _logger.warning(
        "Paged attention does not work on %s (%s): keys and values are gathered for every step "
        "instead, which is slower; see that torch and triton belong together, and that there is a "
        "C compiler",
        kind.device,
        fault,
    )
    return False


def _fault(kind: LayerKind) -> str:
    """Why the kernel does not serve; empty where it does."""
    try:
        from spanwise.device.paged_kernels import TritonError
    except ImportError as error:
        return reason(error)
    try:
        worst = _worst_difference(kind)
    # Triton builds with the host's C compiler and Python's headers, which may not be there.
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return reason(error)
    is_right = worst <= _TOLERANCE[kind.dtype]
    return "" if is_right else f"its result is off by {worst:.1e} of the largest value"


def _worst_difference(kind: LayerKind) -> float:
    """From the reference in float32, on drawn rows, as a share of the largest value; or NaN."""
    counts, length = (1, 2 * SPLIT_KEYS, 2 * SPLIT_KEYS + 45), 2 * SPLIT_KEYS + 64
    rows, num_slots = len(counts), len(counts) * length
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(kind.device, kind.dtype)

    query = draw(rows, kind.kv_heads, kind.group, kind.dim)
    keys = draw(num_slots, kind.kv_heads, kind.dim)
    values = draw(num_slots, kind.kv_heads, kind.value_dim)
    sinks = draw(kind.kv_heads * kind.group) if kind.has_sinks else None
    slots = torch.randperm(num_slots, generator=generator).view(rows, length).to(kind.device)
    count = torch.tensor(counts, device=kind.device)
    found = paged_decode(query, keys, values, slots, count, kind.rule, sinks)
    mask = mask_of(count, length, torch.float32)
    history = keys[slots].float(), values[slots].float()
    wanted = attend_decodes(query.float(), *history, mask, kind.rule, sinks)
    return ((found.float() - wanted).abs().max() / wanted.abs().max()).item()
