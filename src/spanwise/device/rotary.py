"""Rotary positions (arXiv:2104.09864), and a step's keys and values on their way to the cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from spanwise.device import fused_cuda, native

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Angles:
    """How far each token's heads are turned: cosines and sines ``[tokens, rotated dim]``.

    Made once a step for all layers. Heads are turned in halves, which share their angles.
    """

    cosines: torch.Tensor
    sines: torch.Tensor

    @cached_property
    def exact(self) -> Tables:
        """The same in float32."""
        return self.cosines.float().contiguous(), self.sines.float().contiguous()

    @cached_property
    def _signed(self) -> torch.Tensor:
        below, above = self.sines.chunk(2, dim=-1)
        return torch.cat((-below, above), dim=-1)[:, None]

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """``[tokens, heads, dim]`` to the same."""
        dim = self.cosines.shape[-1]
        turned = heads[..., :dim]
        swapped = turned.roll(dim // 2, dims=-1)  # the halves
        turned = (turned * self.cosines[:, None]).addcmul_(swapped, self._signed)
        return turned if dim == heads.shape[-1] else torch.cat((turned, heads[..., dim:]), dim=-1)


class Rotary:
    """Makes angles of a step's tables, once for all layers."""

    def __init__(self) -> None:
        self._made_for: Tables | None = None
        self._angles = Angles(torch.empty(0), torch.empty(0))

    def angles(self, tables: Tables) -> Angles:
        """Of tables ``[1, tokens, rotated dim]``."""
        if self._made_for is not tables:
            self._angles = Angles(tables[0][0], tables[1][0])
            self._made_for = tables
        return self._angles


def place(
    heads: torch.Tensor,
    angles: Angles | None,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Turn queries and keys, store keys and values; the queries ``[tokens, query heads, dim]``.

    ``heads`` ``[tokens, query + 2 * kv heads, dim]`` may be changed. ``keys`` and ``values``
    ``[slots, kv_heads, dim]``: token i goes to ``slots[i]``.
    """
    num_kv = keys.shape[1]
    num_query = heads.shape[1] - 2 * num_kv
    if native.takes(heads) and heads.stride()[1:] == (heads.shape[2], 1):
        native.rotate_and_write(
            heads, None if angles is None else angles.exact, slots, keys, values
        )
        return heads[:, :num_query]
    if heads.device.type == "cuda" and angles is not None:
        cosines, sines = angles.cosines, angles.sines
        return fused_cuda.rotate_and_write(heads, cosines, sines, slots, keys, values)
    turned, value = heads[:, : num_query + num_kv], heads[:, num_query + num_kv :]
    if angles is not None:
        turned = angles.turn(turned)
    keys.index_copy_(0, slots, turned[:, num_query:])
    values.index_copy_(0, slots, value)
    return turned[:, :num_query]
