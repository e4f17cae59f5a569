"""The parts of any module that could be split over ranks, as its structure suggests them.

A part is linears whose columns are dealt out, and one linear that takes those columns back to a
sum. A suggestion may be wrong; whether it is, `model/rehearsal.py` sees.
"""

from __future__ import annotations

from torch import nn

from spanwise.model.attention_unit import find_attentions
from spanwise.model.mlp_unit import find_mlps
from spanwise.model.unit import Unit


def find_units(module: nn.Module) -> list[Unit]:
    """The parts of a module that could be split; no linear is in two of them.

    A linear whose forward was replaced is no longer what it seems.
    """
    named = dict(module.named_modules())
    taken = {id(each) for each in named.values() if "forward" in each.__dict__}
    units: list[Unit] = [*find_attentions(named, taken), *find_mlps(named, taken)]
    return units
