"""The KV arena of one rank as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from mmap import mmap

import torch

from spanwise.model.paged_cache import LayerStore
from spanwise.types.cache import CacheLayout, LayerCache


def attach_stores(
    arena: mmap | memoryview | bytearray | torch.Tensor,
    layer_caches: Mapping[int, LayerCache],
    layout: CacheLayout,
    dtype: torch.dtype,
) -> dict[int, LayerStore]:
    """Lay every owned layer's pages over the arena, group by group, layer by layer.

    The arena outlives the worker: a later one with the same arguments finds the same pages.
    ``arena`` is shared memory, or a flat byte tensor on the device.
    """
    if isinstance(arena, torch.Tensor):
        flat = arena.view(dtype)
    elif len(arena):
        flat = torch.frombuffer(arena, dtype=dtype)
    else:
        flat = torch.empty(0, dtype=dtype)
    stores, at = {}, 0
    for group in layout.groups:
        slots = group.num_blocks * layout.block_size
        for layer in group.layers:
            if layer not in layer_caches:
                continue
            spec = layer_caches[layer]
            parts = []
            for dim in (spec.key_dim, spec.value_dim):
                size = slots * spec.num_heads * dim
                parts.append(flat[at : at + size].view(slots, spec.num_heads, dim))
                at += size
            stores[layer] = LayerStore(parts[0], parts[1], spec)
    return stores
