"""Rows of one token attend together, and each as it would alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.replica import Replica
from tests.support.tiny_models import prompts, save_tiny_model

from spanwise.device import attention
from spanwise.device.attention import AttentionRule, attend_chunk, attend_decodes, mask_of
from spanwise.model.shard import Shard
from spanwise.runner.rows import filled_length
from spanwise.types.sampling import SamplingSpec

KV_HEADS, GROUP, DIM = 2, 3, 16


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@given(st.integers(1, 200_000))
def test_filled_lengths(length: int) -> None:
    filled = filled_length(length)
    assert length <= filled <= max(32, 1.125 * length + 1) or filled - length < 32
    assert filled_length(filled) == filled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_row_is_the_same_alone(dtype: torch.dtype, softcap: float, has_sinks: bool) -> None:
    rows, length = 5, 64
    query = drawn(rows, KV_HEADS, GROUP, DIM).to(dtype)
    key, value = (drawn(rows, length, KV_HEADS, DIM + i)[..., :DIM].to(dtype) for i in range(2))
    counts = torch.tensor([1, 7, 33, 63, 64])
    mask = mask_of(counts, length, dtype)
    rule = AttentionRule(scaling=DIM**-0.5, softcap=softcap)
    sinks = drawn(KV_HEADS * GROUP) if has_sinks else None
    together = attend_decodes(query, key, value, mask, rule, sinks)
    for row, count in enumerate(counts.tolist()):
        own = slice(row, row + 1)
        alone = attend_decodes(query[own], key[own], value[own], mask[own], rule, sinks)
        assert torch.equal(alone, together[own])
        # As the last token of a chunk of that length, which has no filling.
        history = key[row, :count], value[row, :count]
        chunk = attend_chunk(query[own], *history, count - 1, 0, rule, sinks)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert torch.allclose(chunk, together[own], atol=tolerance)


@pytest.mark.parametrize(
    ("start", "first", "window"), [(0, 0, 0), (0, 0, 5), (12, 0, 0), (12, 0, 5), (12, 8, 5)]
)
@pytest.mark.parametrize("at_once", [4, 512])
def test_a_chunk_is_what_its_scores_say(
    start: int, first: int, window: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MASKED_QUERIES", at_once)
    count = 9
    total = start + count
    query = drawn(count, KV_HEADS, GROUP, DIM)
    key, value = drawn(total, KV_HEADS, DIM), drawn(total, KV_HEADS, DIM + 2)[..., :DIM]
    rule = AttentionRule(scaling=0.3, window=window)
    found = attend_chunk(query, key[first:], value[first:], start, first, rule)
    scores = torch.einsum("nhgd,shd->hgns", query, key) * 0.3
    queries, keys = torch.arange(start, total)[:, None], torch.arange(total)[None]
    hidden = keys > queries
    if window:
        hidden |= keys <= queries - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = torch.einsum("hgns,shd->nhgd", weights, value)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "deepseek_v3"])
def test_what_was_never_written_is_never_read(family: str, tmp_path: Path) -> None:
    """Filling reads a row's own slots again: nothing that is not a number comes in."""
    save_tiny_model(family, tmp_path)
    asked = prompts(5)
    sampling = [SamplingSpec()] * len(asked)
    wanted, _ = Replica(tmp_path).generate(asked, 20, sampling)
    replica = Replica(tmp_path)
    for shard in replica.shards:
        poison(shard)
    assert replica.generate(asked, 20, sampling)[0] == wanted


def poison(shard: Shard) -> None:
    for handler in shard._attention.values():
        store: Any = handler.store
        for part in (store.keys, store.values):
            part.fill_(torch.nan)
