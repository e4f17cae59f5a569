"""A loaded model in the form that its device computes fastest; its numbers stay the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spanwise.device.linear import Linear, make_linear
from spanwise.model.attention import LayerAttention
from spanwise.model.flat import Flattener, LayerParts
from spanwise.model.parallel import GatheredLinear, RowParallel, is_linear, replace_forward
from spanwise.model.probe import Probe
from spanwise.model.stage import replace_own_forward


@torch.inference_mode(False)
@torch.no_grad()
def prepare(model: PreTrainedModel, seen: Probe, handlers: dict[int, LayerAttention]) -> int:
    """Flatten the layers that can be, and pack every linear. Call once, when all is loaded.

    ``handlers``: those of the layers that are here. The weights as they were loaded are let go.
    Returns by how many bytes the model has grown: a head that shares the embedding's weight gets
    one of its own.
    """
    config = model.config.get_text_config()
    flattener = Flattener(int(config.hidden_size), make_linear)
    for index, handler in handlers.items():
        name, attention = f"{seen.layers_name}.{index}", seen.attention[index]
        layer = model.get_submodule(name)
        inside = attention.name.removeprefix(f"{name}.")
        if handler.spec.kind == "latent" or attention.value_dim != attention.query_dim:
            continue
        rotated = int(attention.query_dim * _rotary_share(model))
        parts = LayerParts(layer, inside, handler, attention.query_dim, rotated, seen.returns_tuple)
        flat = flattener.flatten(parts)
        if flat is not None:
            replace_own_forward(layer, flat)
            _let_go(flat.replaced)
    return _pack(model)


def _rotary_share(model: PreTrainedModel) -> float:
    """Which share of a head's columns rotary tables are for."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor", 1.0)
    return float(share) if isinstance(share, int | float) else 1.0


def _pack(model: PreTrainedModel) -> int:
    """Pack the linears that are left, each where it stands."""
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    grown = 0
    for module in model.modules():
        if not is_linear(module) or module.weight.is_meta:
            continue
        forward = module.__dict__.get("forward")
        if isinstance(forward, RowParallel):
            forward.product = _linear(module, with_bias=False)
        elif isinstance(forward, GatheredLinear):
            forward.forward = _linear(module)
        elif forward is None:
            replace_forward(module, _linear(module))
        else:
            continue
        assert isinstance(module.weight, torch.Tensor)
        grown += module.weight.nbytes if id(module.weight) in shared else 0
        _let_go([module])
    return grown


def _linear(module: nn.Module, with_bias: bool = True) -> Linear:
    assert isinstance(module, nn.Linear | Conv1D)
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    return make_linear(weight, module.bias if with_bias else None)


def _let_go(modules: Sequence[nn.Module]) -> None:
    """Free the weights of linears that something else computes now; shapes stay to be asked."""
    for module in modules:
        assert isinstance(module.weight, torch.Tensor)
        empty = torch.empty_like(module.weight, device="meta")
        module.weight = nn.Parameter(empty, requires_grad=False)
