"""Attention over cached keys and values: of one sequence's chunk, or of many sequences' last token.

A row's result depends on its own sequence alone, whatever else is in the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

# A mask, or scores, of so many queries at a time; what is longer would take gigabytes of them.
_MASKED_QUERIES = 512


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


def attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    first_key: int,
    rule: AttentionRule,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence: ``query`` ``[n, kv_heads, group, dim]`` over its history.

    ``key``/``value`` ``[s, kv_heads, dim]``; the query heads that read a KV head stand together.
    Query i stands at position ``start + i``, key j at ``first_key + j``. ``sinks`` ``[heads]`` are
    logits that take weight and give nothing (StreamingLLM-like sinks as gpt-oss learns them).
    Returns ``[n, kv_heads, group, value_dim]``.
    """
    key, value = _read_heads(key, value, rule)
    num_queries = query.shape[0]
    begins = start == first_key and key.shape[0] == num_queries
    is_plain = not rule.softcap and sinks is None
    is_causal = is_plain and begins and (not rule.window or num_queries <= rule.window)
    size = num_queries if is_causal else _MASKED_QUERIES
    parts = []
    for at in range(0, num_queries, size):
        own = query[at : at + size]
        seen = start + at + own.shape[0] - first_key
        place = (start + at, first_key)
        parts.append(_attend_block(own, key[:seen], value[:seen], *place, rule, sinks, is_causal))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    first_key: int,
    rule: AttentionRule,
    sinks: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    num_queries, _, group, _ = query.shape
    grouped = query.permute(1, 2, 0, 3)
    keys, values = key.transpose(0, 1), value.transpose(0, 1)
    mask = None
    if not is_causal:
        mask = _visible(num_queries, key.shape[0], start, first_key, rule.window, query.device)
    if not rule.softcap and sinks is None:
        # A KV head's keys serve its group without being copied: the group is a dim of stride 0.
        out = F.scaled_dot_product_attention(
            grouped,
            keys[:, None].expand(-1, group, -1, -1),
            values[:, None].expand(-1, group, -1, -1),
            attn_mask=mask,
            is_causal=is_causal,
            scale=rule.scaling,
        )
    else:
        out = _explicit(grouped[None], keys[None], values[None], mask, rule, sinks)[0]
    return out.permute(2, 0, 1, 3)


def attend_decodes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    rule: AttentionRule,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last token of many sequences, ``query`` ``[rows, kv_heads, group, dim]``.

    ``key``/``value`` ``[rows, s, kv_heads, dim]``: each row its own history, filled up to ``s``
    with finite values, of which ``mask_of`` says what counts. ``s`` follows from a row's own
    length, so that its result does not depend on its neighbours. Returns as ``query``.
    """
    key, value = _read_heads(key, value, rule)
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    if not rule.softcap and sinks is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask[:, None, None], scale=rule.scaling
        )
    visible = mask[:, None, None, None] == 0
    return _explicit(query[:, :, :, None], keys, values, visible, rule, sinks)[:, :, :, 0]


def mask_of(counts: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Added to scores ``[rows, length]``: 0 for a row's first ``counts`` ``[rows]``, then -inf.

    A mask of truths would be made one of these by every layer anew.
    """
    beyond = torch.arange(length, device=counts.device) >= counts[:, None]
    zeros = torch.zeros(beyond.shape, dtype=dtype, device=counts.device)
    return zeros.masked_fill_(beyond, float("-inf"))


def _read_heads(
    key: torch.Tensor, value: torch.Tensor, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    if rule.kv_index is None:
        return key, value
    return key.index_select(-2, rule.kv_index), value.index_select(-2, rule.kv_index)


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
) -> torch.Tensor:
    """``query`` ``[b, kv_heads, group, n, dim]`` over ``[b, kv_heads, s, dim]``, step by step.

    ``mask`` goes with ``[b, kv_heads, group, n, s]``.
    """
    shape = query.shape[:4]
    scores = (query.flatten(2, 3) @ key.transpose(2, 3)).view(*shape, -1).float() * rule.scaling
    if rule.softcap:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sink = sinks.float().view(1, *shape[1:3], 1, 1).expand(*shape, 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    return (weights.to(value.dtype).flatten(2, 3) @ value).view(*shape, -1)
