"""How many bytes a cache takes on each rank, and how large a cache the ranks' memory holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from spanwise.cost.blocks import peak_blocks
from spanwise.errors import DeviceError
from spanwise.types.cache import CacheGroup, CacheLayout, LayerCache


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank stores per token in each of its layers, and the bytes it has for that."""

    name: str
    layer_caches: dict[int, LayerCache]
    value_bytes: int
    available_bytes: int


class CacheWish(msgspec.Struct, frozen=True, kw_only=True):
    """What the cache is for: sizes beyond it would never be used."""

    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_step_tokens: int


def token_bytes(cache: LayerCache, value_bytes: int) -> int:
    """Bytes one token takes in one layer."""
    return cache.num_heads * (cache.key_dim + cache.value_dim) * value_bytes


def arena_bytes(
    layer_caches: Mapping[int, LayerCache], value_bytes: int, layout: CacheLayout
) -> int:
    """Bytes of one rank's arena: every block of every layer it owns."""
    return sum(
        group.num_blocks * layout.block_size * token_bytes(layer_caches[layer], value_bytes)
        for group in layout.groups
        for layer in group.layers
        if layer in layer_caches
    )


def cache_groups(layer_caches: Sequence[LayerCache]) -> dict[int, tuple[int, ...]]:
    """Layers by window (0: everything is kept), in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for layer, cache in enumerate(layer_caches):
        groups.setdefault(cache.window, []).append(layer)
    return {window: tuple(layers) for window, layers in groups.items()}


def size_cache(
    layer_caches: Sequence[LayerCache], ranks: Sequence[RankMemory], wish: CacheWish
) -> CacheLayout:
    """The largest useful cache that every rank can hold; block counts are equal on all ranks.

    Raises DeviceError, naming the rank, where not even one sequence of ``max_model_len`` fits.
    """
    groups = cache_groups(layer_caches)

    def layout(num_blocks: int) -> CacheLayout:
        return CacheLayout(
            wish.block_size,
            tuple(
                CacheGroup(layers, window, _group_blocks(layers, window, num_blocks, wish))
                for window, layers in groups.items()
            ),
        )

    def fits(blocks: int) -> RankMemory | None:
        wanted = layout(blocks)
        for rank in ranks:
            if arena_bytes(rank.layer_caches, rank.value_bytes, wanted) > rank.available_bytes:
                return rank
        return None

    least = -(-wish.max_model_len // wish.block_size)
    short = fits(least)
    if short is not None:
        need = arena_bytes(short.layer_caches, short.value_bytes, layout(least))
        raise DeviceError(
            f"{short.name} has {_size(short.available_bytes)} for its part of the KV cache, but a "
            f"sequence of {wish.max_model_len} tokens takes {_size(need)} there; lower "
            "--max-model-len, raise --kv-cache-memory, or use more devices"
        )
    low, high = least, least * wish.max_num_seqs
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if fits(middle) else (middle, high)
    return layout(low)


def _size(num_bytes: int) -> str:
    unit, name = (2**20, "MiB") if num_bytes >= 2**20 else (2**10, "KiB")
    return f"{num_bytes / unit:,.1f} {name}"


def _group_blocks(layers: tuple[int, ...], window: int, full_blocks: int, wish: CacheWish) -> int:
    """Blocks of a group when the groups without window have ``full_blocks``.

    A windowed group gets what as many longest sequences hold at most as the others have room for.
    """
    if not window:
        return full_blocks
    longest = -(-wish.max_model_len // wish.block_size)
    group = CacheGroup(layers, window, full_blocks)
    each = peak_blocks(group, wish.block_size, wish.max_model_len, wish.max_step_tokens)
    return min(full_blocks, -(-full_blocks // longest) * each)
