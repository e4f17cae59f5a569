"""Routed experts of one rank: whole experts, or a slice of every expert's columns."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from spanwise.model.context import ShardContext

ExpertSplit = Literal["none", "whole", "columns"]


class RoutedExperts:
    """Answers the experts seam for one module of a shard.

    ``owned`` are the global ids of the experts held here, in order. Every rank of the group sees
    every token (the router is replicated), so a dispatch is a selection and only results travel.
    """

    def __init__(self, context: ShardContext, owned: range, split: ExpertSplit) -> None:
        self.context, self.owned, self.split = context, owned, split

    def mix(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """``hidden`` ``[tokens, hidden]``, ``index``/``weights`` ``[tokens, top_k]``.

        With whole experts each (token, expert) product is computed by one rank alone and the
        others add zeros; the weighted sum over a token's experts then runs in id order on every
        rank: the result has the same bits for any number of ranks.
        """
        # In id order, since a router's top-k order is not defined.
        index, order = index.sort(dim=-1)
        weights = weights.gather(-1, order)
        products = hidden.new_zeros(*index.shape, hidden.shape[-1])
        for local, expert in enumerate(self.owned):
            token, slot = (index == expert).nonzero(as_tuple=True)
            if token.numel():
                out = _expert(module, local, hidden[token], self._adds_bias())
                products[token, slot] = out.to(products.dtype)
        if self.split == "whole":
            products = self.context.tp.all_reduce(products)
        mixed = torch.zeros_like(hidden)
        for place in range(index.shape[1]):
            mixed += (products[:, place] * weights[:, place, None]).to(hidden.dtype)
        return self.context.tp.all_reduce(mixed) if self.split == "columns" else mixed

    def _adds_bias(self) -> bool:
        """The output bias is whole on every rank, so of a split expert one rank adds it."""
        return self.split != "columns" or self.context.tp.rank == 0


def _expert(module: nn.Module, local: int, hidden: torch.Tensor, adds_bias: bool) -> torch.Tensor:
    """One expert's output ``[n, hidden]``, unweighted; layouts as transformers declares them."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(module, first, local, hidden, adds_bias=True)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[operator]
    return _linear(module, "down_proj", local, inner, adds_bias)


def _linear(
    module: nn.Module, name: str, local: int, hidden: torch.Tensor, adds_bias: bool
) -> torch.Tensor:
    weight = getattr(module, name)[local]
    out = hidden @ weight if module.is_transposed else F.linear(hidden, weight)
    if module.has_bias and adds_bias:
        out = out + getattr(module, f"{name}_bias")[local]
    return out
