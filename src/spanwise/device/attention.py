"""Attention of one sequence's new tokens over its cached keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812


@dataclass(frozen=True)
class AttentionRule:
    """How scores become weights: constants of a layer.

    ``window`` 0 sees everything before; ``softcap`` 0 is off (Gemma 2, arXiv:2408.00118).
    ``kv_index``: for each query head the key/value head it reads, None where the query heads
    divide evenly over the KV heads in order.
    """

    scaling: float
    window: int = 0
    softcap: float = 0.0
    kv_index: torch.Tensor | None = None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    first_key: int,
    rule: AttentionRule,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of ``query`` over ``key``/``value`` ``[1, kv_heads, s, dim]``.

    ``query`` is ``[n, kv_heads, group, dim]``: the query heads that read a KV head stand together.
    Query i stands at position ``start + i``, key j at ``first_key + j``. ``sinks`` ``[heads]`` are
    logits that take weight and give nothing (StreamingLLM-like sinks as gpt-oss learns them).
    Returns ``[n, kv_heads, group, value_dim]``. Depends on this sequence alone.
    """
    if rule.kv_index is not None:
        key, value = key[:, rule.kv_index], value[:, rule.kv_index]
    num_queries, kv_heads, group, dim = query.shape
    mask = _visible(num_queries, key.shape[2], start, first_key, rule.window, query.device)
    is_plain = not rule.softcap and sinks is None
    if num_queries == 1 and mask is None and is_plain:  # most rows of most steps
        return F.scaled_dot_product_attention(query, key, value, scale=rule.scaling)
    # The query heads of a KV head become more queries of it: no copy of keys and values.
    folded = query.permute(1, 2, 0, 3).reshape(1, kv_heads, group * num_queries, dim)
    if mask is not None and group > 1:
        mask = mask.repeat(group, 1)
    if is_plain:
        out = F.scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, scale=rule.scaling
        )[0]
    else:
        out = _explicit(folded[0], key[0], value[0], mask, rule, sinks, group)
    return out.view(kv_heads, group, num_queries, -1).permute(2, 0, 1, 3)


def _visible(
    num_queries: int, num_keys: int, start: int, first_key: int, window: int, device: torch.device
) -> torch.Tensor | None:
    """Which keys each query sees, ``[queries, keys]``; None where it is all of them."""
    oldest = max(0, start - window + 1) if window else 0
    if num_queries == 1 and first_key >= oldest and first_key + num_keys == start + 1:
        return None
    queries = torch.arange(start, start + num_queries, device=device)[:, None]
    keys = torch.arange(first_key, first_key + num_keys, device=device)[None]
    visible = keys <= queries
    return visible & (keys > queries - window) if window else visible


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rule: AttentionRule,
    sinks: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    scores = (query @ key.transpose(1, 2)).float() * rule.scaling
    if rule.softcap:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        kv_heads, rows, _ = scores.shape
        sink = sinks.float().view(kv_heads, group, 1).expand(-1, -1, rows // group)
        sink = sink.reshape(kv_heads, rows, 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(value.dtype) @ value
