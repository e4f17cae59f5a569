"""The paged cache of one shard, shaped like a cache of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spanwise.model.context import ShardContext
from spanwise.model.seams import CacheShape
from spanwise.types.cache import LayerCache


@dataclass(frozen=True)
class LayerStore:
    """One layer's pages: ``keys`` ``[slots, heads, key_dim]``, ``values`` likewise.

    A latent layer has one head, and what it calls keys and values are the latent and the rotated
    part every head shares.
    """

    keys: torch.Tensor
    values: torch.Tensor
    spec: LayerCache

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store ``[tokens, heads, dim]``."""
        self.keys.index_copy_(0, slots, keys)
        self.values.index_copy_(0, slots, values)

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[slots, heads, dim]``.

        By ``index_select``, since indexing costs several times as much.
        """
        return self.keys.index_select(0, slots), self.values.index_select(0, slots)


class PagedCache(CacheShape):
    """Writes a step's keys and values to their slots."""

    def __init__(self, context: ShardContext, stores: dict[int, LayerStore]) -> None:
        super().__init__()
        self.context = context
        self.stores = stores

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[1, heads, tokens, dim]``.

        Returns the same two, except for a latent layer: there every row's whole history, row after
        row, since the layer itself expands latents to heads before it attends.
        """
        step, store = self.context.step, self.stores[layer_idx]
        group = step.group_of[layer_idx]
        slots = step.write_slots[group]
        store.write(slots, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        if store.spec.kind != "latent":
            return key_states, value_states
        keys, values = store.read(torch.cat([chunk.slots for chunk in step.reads[group].chunks]))
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
