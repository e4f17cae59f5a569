"""Which cache each layer keeps, and how layers of one kind share a block table."""

from __future__ import annotations

from typing import Literal

import msgspec

CacheKind = Literal["full", "window", "latent"]


class LayerCache(msgspec.Struct, frozen=True, array_like=True):
    """What one layer stores for a token.

    ``full``/``window``: keys and values of ``num_heads`` heads (before any split).
    ``latent``: one row of ``key_dim`` + ``value_dim`` values, never split (MLA).
    ``window`` is the number of positions a query sees, itself included; 0 for all.
    """

    kind: CacheKind
    num_heads: int
    key_dim: int
    value_dim: int
    window: int = 0


class CacheGroup(msgspec.Struct, frozen=True, array_like=True):
    """Layers whose blocks live and die together: one block table and one budget.

    ``window``: 0 keeps every block; else a block is freed when all its positions are out of reach.
    """

    layers: tuple[int, ...]
    window: int
    num_blocks: int


class CacheLayout(msgspec.Struct, frozen=True, array_like=True):
    """All groups of a replica; block ids count from 0 in each group. Equal on every rank."""

    block_size: int
    groups: tuple[CacheGroup, ...]
