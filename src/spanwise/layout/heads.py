"""Attention heads over tensor-parallel ranks, with grouped key/value heads.

In grouped-query attention ``num_heads / num_kv_heads`` neighbouring query heads read one key/value
head (Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints").
"""

from __future__ import annotations

from dataclasses import dataclass

from spanwise.errors import LayoutError
from spanwise.layout.split import split_evenly


@dataclass(frozen=True)
class HeadShare:
    """The global query heads a rank computes, and the global KV heads it holds for them."""

    query: range
    kv: range


def split_heads(num_heads: int, num_kv_heads: int, tp: int) -> tuple[HeadShare, ...]:
    """Deal the heads to ``tp <= num_heads`` ranks; no share is empty.

    Whole KV heads with all their query heads while there are enough of them; beyond that query
    heads are dealt evenly, and a KV head lies on every rank that has one of its query heads.
    Raises LayoutError where the query heads do not group evenly.
    """
    assert 1 <= tp <= num_heads, (tp, num_heads)
    group = _group_size(num_heads, num_kv_heads)
    if tp <= num_kv_heads:
        return tuple(
            HeadShare(range(kv.start * group, kv.stop * group), kv)
            for kv in split_evenly(num_kv_heads, tp)
        )
    return tuple(
        HeadShare(query, range(query.start // group, (query.stop - 1) // group + 1))
        for query in split_evenly(num_heads, tp)
    )


def kv_index(share: HeadShare, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """For each query head of the share, the position in ``share.kv`` of the KV head it reads."""
    group = _group_size(num_heads, num_kv_heads)
    return tuple(head // group - share.kv.start for head in share.query)


def _group_size(num_heads: int, num_kv_heads: int) -> int:
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise LayoutError(
            f"{num_heads} attention heads do not group over {num_kv_heads} KV heads;"
            " the number of attention heads must be a multiple of the number of KV heads"
        )
    return num_heads // num_kv_heads
