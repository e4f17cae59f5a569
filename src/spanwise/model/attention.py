"""A layer's side of the attention seam: from flattened tokens to one sequence after another."""

from __future__ import annotations

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
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        seen = 0
        for row in self.context.step.rows:
            group = self.context.step.group_of[self.layer]
            slots = row.read_slots[group]
            if self.spec.kind == "latent":
                keys = key[0, :, seen : seen + slots.shape[0]]
                values = value[0, :, seen : seen + slots.shape[0]]
                seen += slots.shape[0]
            else:
                assert self.cache is not None
                keys, values = self.cache.read(self.layer, slots)
            end = row.offset + row.count
            part = attend(
                query[0, :, row.offset : end],
                keys,
                values,
                row.start,
                row.first_read[group],
                rule,
                s_aux,
            )
            out[row.offset : end] = part.transpose(0, 1)
        return out[None]
