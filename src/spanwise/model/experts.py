"""Routed experts of one rank: whole experts, or a slice of every expert's columns."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from spanwise.comm.communicator import Communicator
from spanwise.comm.ordered_sum import ordered_sum
from spanwise.layout.split import split_evenly
from spanwise.model.context import ShardContext

ExpertSplit = Literal["none", "whole", "columns"]

# From here on two exchanges of less cost less than one of more.
_MANY_BYTES = 1 << 17


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
        others add zeros; the weighted sum over a token's experts then runs in id order, on every
        rank or on the token's owner: the result has the same bits for any number of ranks.
        """
        # In id order, since a router's top-k order is not defined.
        index, order = index.sort(dim=-1)
        weights = weights.gather(-1, order)
        products = self._products(module, hidden, index)
        if self.split == "whole":
            return combine(self.context.tp, products, weights)
        mixed = weighted_sum(products, weights)
        return self.context.tp.all_reduce(mixed) if self.split == "columns" else mixed

    def _products(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """``[tokens, top_k, hidden]``: the outputs of the experts held here, zeros for others."""
        products = hidden.new_zeros(*index.shape, hidden.shape[-1])
        for local, expert in enumerate(self.owned):
            token, slot = (index == expert).nonzero(as_tuple=True)
            if token.numel():
                out = _expert(module, local, hidden[token], self._adds_bias())
                products[token, slot] = out.to(products.dtype)
        return products

    def _adds_bias(self) -> bool:
        """The output bias is whole on every rank, so of a split expert one rank adds it."""
        return self.split != "columns" or self.context.tp.rank == 0


def combine(tp: Communicator, products: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``[tokens, hidden]`` on every rank, of products that all ranks but one have as zeros.

    ``products`` ``[tokens, top_k, hidden]`` and ``weights`` ``[tokens, top_k]`` in the order in
    which they are summed. The way depends on shapes only, so all ranks go the same.
    """
    many = tp.size > 1 and products.nbytes >= _MANY_BYTES
    return (combine_by_owner if many else combine_on_every_rank)(tp, products, weights)


def combine_on_every_rank(
    tp: Communicator, products: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every rank gets every product and sums all tokens: one exchange, of the most bytes."""
    return weighted_sum(tp.all_reduce(products), weights)


def combine_by_owner(
    tp: Communicator, products: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Each rank gets the products of its share of the tokens, sums them, and hands the sums on.

    Takes at least two ranks.
    """
    shares = split_evenly(len(products), tp.size)
    own, sizes = shares[tp.rank], [len(share) for share in shares]
    taken = tp.all_to_all(products, [sizes] * tp.size)
    parts = taken.view(tp.size, len(own), *products.shape[1:]).unbind()
    total = ordered_sum(parts, out=torch.empty_like(parts[0]))
    return tp.all_gather(weighted_sum(total, weights[own.start : own.stop]), sizes, dim=0)


def weighted_sum(products: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``[tokens, hidden]``: each token's products, each times its weight, summed in their order."""
    mixed = products.new_zeros(products.shape[0], products.shape[2])
    for place in range(products.shape[1]):
        mixed += (products[:, place] * weights[:, place, None]).to(products.dtype)
    return mixed


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
