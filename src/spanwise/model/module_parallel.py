"""Tensor parallelism for any module: the shares of its attentions and MLPs over some ranks.

Column-parallel linears, then a row-parallel one whose products are summed (Shoeybi et al. 2019,
"Megatron-LM"). What could be split is read off the structure (`model/module_units.py`); it is split
where a run on an example showed that the shares compute what the whole does
(`model/rehearsal.py`), and stays whole on every rank otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers.pytorch_utils import Conv1D

from spanwise.model.attention_unit import AttentionUnit
from spanwise.model.exchange import Exchange
from spanwise.model.mlp_unit import MlpUnit
from spanwise.model.module_units import find_units
from spanwise.model.parallel import replace_forward
from spanwise.model.rehearsal import Rehearsal, Run
from spanwise.model.share import apply
from spanwise.model.unit import Unit


@dataclass(frozen=True)
class SplitReport:
    """The modules that were split, by name, and the linears that every rank holds whole."""

    attentions: tuple[str, ...]
    mlps: tuple[str, ...]
    whole: tuple[str, ...]


class RowShare:
    """A linear over a share of its input: the products are summed, then the bias is added once."""

    def __init__(self, linear: nn.Module, exchange: Exchange) -> None:
        self.linear, self.exchange = linear, exchange

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in_share]`` to ``[..., out]``, equal on every rank."""
        weight, bias = self.linear.weight, self.linear.bias
        assert isinstance(weight, torch.Tensor)
        transposed = isinstance(self.linear, Conv1D)
        product = hidden @ weight if transposed else F.linear(hidden, weight)
        total = self.exchange.all_reduce(product)
        return total + bias if isinstance(bias, torch.Tensor) else total


def split_module(
    module: nn.Module, rank: int, size: int, exchange: Exchange, run: Run
) -> SplitReport:
    """Let ``module`` hold its share of ``size``, in place; its parts sum over ``exchange``.

    ``run`` calls the module on an example and gives the outputs: once with the module as it is,
    then with the shares of each rank, again where a part turns out to be something else. Every rank
    looks at the shares of all, on the same example, and so decides alike: all reports are equal.
    What ``run`` raises of the whole module is passed on.
    """
    assert 0 <= rank < size, (rank, size)
    with torch.inference_mode(False), torch.no_grad():  # weights are no tensors of inference
        units = _upheld([unit for unit in find_units(module) if unit.shares(size)], size, run)
        for unit in units:
            apply(unit.shares(size)[rank])
            replace_forward(unit.row, RowShare(unit.row, exchange))
    return _report(module, units)


def tensor_refusal(module: nn.Module) -> str:
    """Why nothing of a module could be split; "" where something may be.

    From the structure alone: the module may be without memory.
    """
    if max_tensor_parallel(module) > 1:
        return ""
    convolutions = sum(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
    beside = f"; its {convolutions} convolutions stay whole" if convolutions else ""
    return (
        f"{type(module).__name__} has no attention of several heads and no linear that follows "
        f"another{beside}; use one rank (-tp 1) with stages (-pp) or replicas (-dp)"
    )


def max_tensor_parallel(module: nn.Module) -> int:
    """Over how many ranks a module could be split: the heads of the attention that has the most.

    The columns of the widest MLP where there is no attention; 1 where there is neither.
    """
    units = find_units(module)
    heads = [unit.most for unit in units if isinstance(unit, AttentionUnit)]
    return max(heads or [unit.most for unit in units], default=1)


def _upheld(units: Sequence[Unit], size: int, run: Run) -> list[Unit]:
    """The units, or what else they may be, that every rank's shares were seen to uphold."""
    rehearsal = Rehearsal(units, run)
    units = [unit for unit in units if rehearsal.has_seen(unit)]
    while refuted := _refuted(rehearsal, units, size):
        next_ones = ((u.otherwise if u.kind in refuted else u) for u in units)
        units = [unit for unit in next_ones if unit is not None]
    return units


def _refuted(rehearsal: Rehearsal, units: Sequence[Unit], size: int) -> set[tuple[object, ...]]:
    """The kinds of the units that the first rank with anything to object to refutes."""
    dealt = [unit.shares(size) for unit in units]
    for rank in range(size if units else 0):
        if refuted := rehearsal.refuted(units, [shares[rank] for shares in dealt]):
            return {unit.kind for unit in refuted}
    return set()


def _report(module: nn.Module, units: Sequence[Unit]) -> SplitReport:
    held = {id(linear) for unit in units for linear in (*unit.columns, unit.row)}
    return SplitReport(
        attentions=tuple(unit.name for unit in units if isinstance(unit, AttentionUnit)),
        mlps=tuple(unit.name for unit in units if isinstance(unit, MlpUnit)),
        whole=tuple(
            name
            for name, each in module.named_modules()
            if isinstance(each, nn.Linear | Conv1D) and id(each) not in held
        ),
    )
