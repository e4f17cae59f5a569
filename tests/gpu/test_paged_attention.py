"""The paged kernel gives what ``attend_decodes`` does, for a row whatever is beside it.

Runs on a card, or without one in Triton's interpreter, where Triton is installed:
``TRITON_INTERPRET=1 python -m pytest tests/gpu/test_paged_attention.py``, in about two minutes.
Torch's builds for the CPU come without Triton, which then has to be on PYTHONPATH.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from spanwise.device.attention import AttentionRule, attend_decodes, mask_of
from spanwise.device.paged_attention import MAX_SPLITS, SPLIT_KEYS, paged_decode, reads_in_place

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Against float32 all the way: TF32 would miss that of float32, in the others outputs are rounded
# to the type (the relative one), and weights before they meet values.
ABSOLUTE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KV_HEADS = 2
# Around the borders of tiles and splits.
COUNTS = (1, 2, 31, 63, 64, 65, 128, 129, 200)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter multiplies bfloat16 as the integers it keeps it in; a card as float32."""
    if IS_INTERPRETED:
        import numpy as np
        import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from triton.runtime.interpreter import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
            InterpreterBuilder,
            TensorHandle,
        )

        own = InterpreterBuilder.create_dot

        def widened(handle: Any) -> Any:
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            bits = handle.data.astype(np.uint32) << 16
            return TensorHandle(bits.view(np.float32), tl.float32)

        def create_dot(builder: Any, left: Any, right: Any, *rest: Any) -> Any:
            return own(builder, widened(left), widened(right), *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield


@dataclass(frozen=True)
class Case:
    """Rows over a cache in which whatever no row may read is NaN."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    counts: torch.Tensor
    rule: AttentionRule
    sinks: torch.Tensor | None

    def paged(self, rows: slice = slice(None), width: int | None = None) -> torch.Tensor:
        query, slots, counts = self.query[rows], self.slots[rows, :width], self.counts[rows]
        return paged_decode(query, self.keys, self.values, slots, counts, self.rule, self.sinks)

    def wanted(self) -> torch.Tensor:
        """By the reference, in float32 on the CPU."""
        keys, values = (part.cpu().float()[self.slots.cpu()] for part in (self.keys, self.values))
        mask = mask_of(self.counts.cpu(), self.slots.shape[1], torch.float32)
        keys, values = (part.nan_to_num(0.0) for part in (keys, values))
        sinks = None if self.sinks is None else self.sinks.cpu()
        return attend_decodes(self.query.cpu().float(), keys, values, mask, self.rule, sinks)

    def check(self) -> None:
        found = self.paged()
        assert found.shape == (*self.query.shape[:3], self.values.shape[2])
        assert found.dtype == self.query.dtype
        atol, rtol = ABSOLUTE[found.dtype], RELATIVE[found.dtype]
        torch.testing.assert_close(found.cpu().float(), self.wanted(), atol=atol, rtol=rtol)


def make(
    dtype: torch.dtype,
    group: int,
    dim: int,
    *,
    counts: tuple[int, ...] = COUNTS,
    value_dim: int | None = None,
    kv_heads: int = KV_HEADS,
    softcap: float = 0.0,
    has_sinks: bool = False,
    filled: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(group * dim)
    length = max(*counts, filled)
    num_slots = sum(counts) + length
    rows = len(counts)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    keys, values = draw(num_slots, kv_heads, dim), draw(num_slots, kv_heads, value_dim or dim)
    order = torch.randperm(num_slots, generator=generator)
    own, never_written = torch.split(order[: sum(counts)], list(counts)), order[sum(counts) :]
    keys[never_written], values[never_written] = torch.nan, torch.nan
    slots = never_written[torch.arange(length)].repeat(rows, 1)
    for row, part in enumerate(own):
        slots[row, : len(part)] = part
    # As a layer gives them: the queries beside what else its product gave.
    heads = kv_heads * group
    query = draw(rows, heads + 3, dim).to(DEVICE)[:, :heads].reshape(rows, kv_heads, group, dim)
    return Case(
        query,
        keys.to(DEVICE),
        values.to(DEVICE),
        slots.to(DEVICE),
        torch.tensor(counts, device=DEVICE),
        AttentionRule(scaling=dim**-0.5, softcap=softcap),
        draw(heads).to(DEVICE) if has_sinks else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 4, 5, 8])
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
def test_rows_of_any_length(dtype: torch.dtype, group: int, dim: int) -> None:
    make(dtype, group, dim).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_softcap_and_sinks(dtype: torch.dtype, softcap: float, has_sinks: bool) -> None:
    make(dtype, 5, 64, softcap=softcap, has_sinks=has_sinks).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "value_dim"),
    [(1, 32, 256, 256), (3, 2, 192, 128), (1, 71, 64, 64), (2, 1, 8, 8), (1, 16, 512, 512)],
)
def test_shapes_out_of_the_way(
    dtype: torch.dtype, kv_heads: int, group: int, dim: int, value_dim: int
) -> None:
    counts = (1, 130, 40)
    make(dtype, group, dim, kv_heads=kv_heads, value_dim=value_dim, counts=counts).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_of_every_size(dtype: torch.dtype) -> None:
    full = SPLIT_KEYS * MAX_SPLITS
    make(dtype, 2, 16, kv_heads=1, counts=(full - 1, full, full + 1, 2 * full + 1, 3)).check()


def test_large_scores_do_not_overflow() -> None:
    case = make(torch.float32, 4, 64, softcap=30.0)
    case.query.mul_(1e4)
    assert case.paged().isfinite().all()
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_row_has_the_same_bits_alone(dtype: torch.dtype, has_sinks: bool) -> None:
    """With another width, too, and with slots and queries that begin elsewhere in memory."""
    full = SPLIT_KEYS * MAX_SPLITS
    counts = (1, 64, 129, 200, full + 77)
    case = make(dtype, 8, 64, counts=counts, has_sinks=has_sinks, filled=full + 300)
    together = case.paged()
    for row, count in enumerate(counts):
        for width in {count, min(count + 3, case.slots.shape[1])}:
            assert torch.equal(case.paged(slice(row, row + 1), width)[0], together[row])
    assert torch.equal(case.paged(slice(1, 4), 200), together[1:4])


def test_a_layer_is_checked_and_chosen() -> None:
    case = make(torch.float32, 4, 64)
    arguments = (case.query, case.keys, case.values, case.rule)
    assert reads_in_place(*arguments) == (not IS_INTERPRETED)
