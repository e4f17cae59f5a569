"""Forwards that replace a module's own where its weights are one rank's share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers.pytorch_utils import Conv1D

from spanwise.model.context import ShardContext


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain matrix with an optional bias."""
    return type(module) in (nn.Linear, Conv1D)


def features(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear."""
    assert isinstance(module.weight, torch.Tensor)
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


class RowParallel:
    """A linear over a share of the input: partial products are summed, the bias added once.

    ``product``: what multiplies, without the bias; None for the module's weight as it is.
    """

    def __init__(self, module: nn.Module, context: ShardContext) -> None:
        self.module, self.context = module, context
        self.product: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in_share]`` to ``[..., out]``, equal on every rank."""
        total = self.context.tp.all_reduce((self.product or self._multiply)(hidden))
        bias = self.module.bias
        return total + bias if isinstance(bias, torch.Tensor) else total

    def add_to(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, out]`` and ``[rows, in_share]`` to ``[rows, out]``, equal on every rank."""
        return residual + self(hidden)

    def _multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return hidden @ weight if isinstance(self.module, Conv1D) else F.linear(hidden, weight)


class VocabParallelEmbedding:
    """A lookup in a share of the vocabulary's rows; others' tokens come from the other ranks."""

    def __init__(self, module: nn.Embedding, context: ShardContext, rows: range) -> None:
        self.forward: Callable[[torch.Tensor], torch.Tensor] = module.forward
        self.context, self.rows = context, rows

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[..., tokens]`` to ``[..., tokens, hidden]``, equal on every rank."""
        local = input_ids - self.rows.start
        foreign = (local < 0) | (local >= len(self.rows))
        if len(self.rows) == 0:
            raise AssertionError("a rank without vocabulary rows")
        found = self.forward(local.masked_fill(foreign, 0))
        # Exactly one rank adds something other than zero, so the sum is exact.
        return self.context.tp.all_reduce(found.masked_fill(foreign[..., None], 0))


class GatheredLinear:
    """A linear over a share of the output columns, whose result every rank gets whole."""

    def __init__(self, module: nn.Module, context: ShardContext, sizes: Sequence[int]) -> None:
        self.forward: Callable[[torch.Tensor], torch.Tensor] = module.forward
        self.context, self.sizes = context, list(sizes)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return self.context.tp.all_gather(self.forward(hidden), self.sizes, dim=-1)


class GatheredNorm:
    """A norm over all heads' columns: gathers the shares, norms the whole, keeps the own part.

    ``shares[r]`` are the columns rank r holds; replicated KV heads may stand in several.
    """

    def __init__(
        self, module: nn.Module, context: ShardContext, shares: Sequence[range], rank: int
    ) -> None:
        self.forward: Callable[[torch.Tensor], torch.Tensor] = module.forward
        self.context, self.sizes, self.own = context, [len(s) for s in shares], shares[rank]
        gathered = [column for share in shares for column in share]
        where = {column: at for at, column in reversed(list(enumerate(gathered)))}
        order = [where[column] for column in range(len(where))]
        self.order = None if gathered == list(range(len(gathered))) else torch.tensor(order)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., own columns]`` to the same."""
        whole = self.context.tp.all_gather(hidden, self.sizes, dim=-1)
        if self.order is not None:
            whole = whole[..., self.order]
        return self.forward(whole)[..., self.own.start : self.own.stop]


def replace_forward(module: nn.Module, forward: Callable[..., object]) -> None:
    """Let ``module`` compute by ``forward``; its parameters keep their names."""
    module.__dict__["forward"] = forward
