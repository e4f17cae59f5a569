"""A layer's side of the attention seam: from flattened tokens to one sequence after another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from spanwise.device.attention import AttentionRule, attend
from spanwise.model.context import ShardContext
from spanwise.model.paged_cache import PagedCache
from spanwise.types.cache import LayerCache


class LayerAttention:
    """Attends over the paged cache for one layer of a shard.

    ``kv_index`` names the local KV head of each local query head, None where they divide evenly.
    """

    def __init__(
        self,
        context: ShardContext,
        layer: int,
        spec: LayerCache,
        kv_index: tuple[int, ...] | None,
        device: torch.device,
    ) -> None:
        self.context, self.layer, self.spec = context, layer, spec
        self.kv_index = None if kv_index is None else torch.tensor(kv_index, device=device)
        self.cache: PagedCache | None = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """``query`` ``[1, heads, tokens, dim]`` to ``[1, tokens, heads, value_dim]``."""
        rule = AttentionRule(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=self.spec.window,
            softcap=softcap or 0.0,
            kv_index=self.kv_index,
        )
        step = self.context.step
        group = step.group_of[self.layer]
        # The query heads of a KV head together; each alone where they do not divide evenly.
        heads, tokens, dim = query.shape[1:]
        kv_heads = key.shape[1] if self.kv_index is None else heads
        queries = query[0].transpose(0, 1).reshape(tokens, kv_heads, heads // kv_heads, dim)
        counts = [row.count for row in step.rows]
        parts = [
            attend(own, keys, values, row.start, row.first_read[group], rule, s_aux)
            for row, own, (keys, values) in zip(
                step.rows, torch.split(queries, counts), self._histories(key, value), strict=True
            )
        ]
        return torch.cat(parts).flatten(1, 2)[None]

    def _histories(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """What each row reads; a latent layer gives it itself, expanded, row after row."""
        if self.spec.kind == "latent":
            step = self.context.step
            counts = step.reads[step.group_of[self.layer]].counts
            keys, values = (torch.split(part, counts, dim=2) for part in (key, value))
            return zip(keys, values, strict=True)
        assert self.cache is not None
        return self.cache.histories(self.layer)
