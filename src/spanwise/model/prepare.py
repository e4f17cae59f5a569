"""A loaded model in the form that its device computes fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spanwise.device.fp8 import Fp8Linear
from spanwise.device.int8 import Int8Linear
from spanwise.device.linear import Linear, PlainLinear, make_linear, packs
from spanwise.model import tables
from spanwise.model.attention import LayerAttention
from spanwise.model.flatten import Flattener, LinearForm
from spanwise.model.parallel import (
    GatheredLinear,
    RowParallel,
    features,
    is_linear,
    replace_forward,
)
from spanwise.model.probe import Probe
from spanwise.model.stage import replace_own_forward
from spanwise.model.watch import LayerParts
from spanwise.types.worker import Quantization

_QUANTIZED: dict[Quantization, type[Int8Linear | Fp8Linear]] = {
    "int8": Int8Linear,
    "fp8": Fp8Linear,
}


@torch.inference_mode(False)
@torch.no_grad()
def prepare(
    model: PreTrainedModel,
    seen: Probe,
    handlers: dict[int, LayerAttention],
    quantization: Quantization | None,
) -> int:
    """Flatten the layers that can be, and pack every linear. Call once, when all is loaded.

    ``handlers``: those of the layers that are here. The weights as they were loaded are let go.
    Returns by how many bytes the model has grown: by a head that shared the embedding's weight and
    gets one of its own; less what quantization saves.
    """
    return _Preparation(model, seen, quantization).run(handlers)


def quantized_growth(model: PreTrainedModel, seen: Probe, quantization: Quantization | None) -> int:
    """By how many bytes quantization lets a model without memory grow: below 0.

    Where sizes are filled up, linears that become one may be a little smaller.
    """
    if quantization is None:
        return 0
    grown = 0
    for name, module in model.named_modules():
        if not is_linear(module) or not _is_of_layer(name, seen):
            continue
        assert isinstance(module, nn.Linear | Conv1D)
        num_in, num_out = features(module)
        if module.weight.numel() and _has_known_forward(module):
            grown += _QUANTIZED[quantization].bytes_of(num_out, num_in) - module.weight.nbytes
    return grown


class _Preparation:
    def __init__(
        self, model: PreTrainedModel, seen: Probe, quantization: Quantization | None
    ) -> None:
        self._model, self._seen, self._quantization = model, seen, quantization
        self._grown = 0

    def run(self, handlers: dict[int, LayerAttention]) -> int:
        form = LinearForm(self._of_layer, lambda w: self._quantization is None and packs(w))
        flattener = Flattener(int(self._model.config.get_text_config().hidden_size), form)
        for index, handler in handlers.items():
            self._flatten(index, handler, flattener)
        self._pack()
        return self._grown

    def _flatten(self, index: int, handler: LayerAttention, flattener: Flattener) -> None:
        name, attention = f"{self._seen.layers_name}.{index}", self._seen.attention[index]
        if handler.spec.kind == "latent" or attention.value_dim != attention.query_dim:
            return
        layer = self._model.get_submodule(name)
        parts = LayerParts(
            layer,
            attention.name.removeprefix(f"{name}."),
            handler,
            attention.query_dim,
            int(attention.query_dim * _rotary_share(self._model)),
            self._seen.returns_tuple,
        )
        flat = flattener.flatten(parts)
        if flat is not None:
            replace_own_forward(layer, flat)
            _let_go(flat.replaced)

    def _pack(self) -> None:
        """Pack the linears that are left, each where it stands."""
        shared = {id(m.weight) for m in self._model.modules() if isinstance(m, nn.Embedding)}
        for name, module in self._model.named_modules():
            if not is_linear(module):
                continue
            assert isinstance(module, nn.Linear | Conv1D)
            if module.weight.is_meta:
                continue
            linear = self._linear(name, module)
            if isinstance(linear, PlainLinear):  # as it stands
                continue
            forward = module.__dict__.get("forward")
            if isinstance(forward, RowParallel):
                forward.product = linear
            elif isinstance(forward, GatheredLinear):
                forward.forward = linear
            elif forward is None:
                replace_forward(module, linear)
            else:
                continue
            self._grown += module.weight.nbytes if id(module.weight) in shared else 0
            _let_go([module])

    def _linear(self, name: str, module: nn.Linear | Conv1D) -> Linear:
        """Without the bias where ranks add up products: it is added once, after them."""
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        make = self._of_layer if _is_of_layer(name, self._seen) else self._as_loaded
        adds_up = isinstance(module.__dict__.get("forward"), RowParallel)
        return make(weight, None if adds_up else module.bias)

    def _of_layer(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """A linear of a decoder layer, which may be quantized."""
        if self._quantization is None or not weight.numel():
            return self._as_loaded(weight, bias)
        return self._counted(_QUANTIZED[self._quantization](weight, bias), weight)

    def _as_loaded(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return self._counted(make_linear(weight, bias), weight)

    def _counted(self, linear: Linear, weight: torch.Tensor) -> Linear:
        self._grown += linear.num_bytes - weight.nbytes
        return linear


def _is_of_layer(name: str, seen: Probe) -> bool:
    """Whether a linear is one of a decoder layer, which may be quantized."""
    return name.startswith(f"{seen.layers_name}.") and name.rpartition(".")[2] not in tables.ROUTERS


def _has_known_forward(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return forward is None or isinstance(forward, RowParallel | GatheredLinear)


def _rotary_share(model: PreTrainedModel) -> float:
    """Which share of a head's columns rotary tables are for."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor", 1.0)
    return float(share) if isinstance(share, int | float) else 1.0


def _let_go(modules: Sequence[nn.Module]) -> None:
    """Free the weights of linears that something else computes now; shapes stay to be asked."""
    for module in modules:
        assert isinstance(module.weight, torch.Tensor)
        empty = torch.empty_like(module.weight, device="meta")
        module.weight = nn.Parameter(empty, requires_grad=False)
