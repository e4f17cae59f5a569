"""Cutting a model's layers into stages without touching its forward.

Every stage runs the model's own forward. Layers it does not own pass their input on, modules
before the layers give zeros of the right shape (what they would compute reaches the first owned
layer only as hidden states, and those are replaced by the stage before's), and after the last
owned layer the forward is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spanwise.model.context import ShardContext
from spanwise.model.parallel import replace_forward
from spanwise.model.probe import NUM_TOKENS, Probe, hidden_of
from spanwise.types.worker import ShardSpec


class StageOutput(Exception):  # noqa: N818 - leaves a forward early; nothing went wrong
    """Carries the hidden states ``[1, tokens, hidden]`` out of a stage's last layer."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _PassLayer(nn.Module):
    """Stands for a layer another stage owns; keeps the attributes the model's forward reads."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        for name, value in layer.__dict__.items():
            if not name.startswith("_") and name not in self.__dict__:
                self.__dict__[name] = value
        self._returns_tuple = returns_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Give back the hidden states."""
        hidden = hidden_of(args, kwargs)
        return (hidden,) if self._returns_tuple else hidden


class _Absent(nn.Module):
    """Stands for a module around the layers: zeros of its output's shape."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, context: ShardContext) -> None:
        super().__init__()
        self.shape, self.dtype, self.context = shape, dtype, context

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Zeros for the tokens of the step."""
        tokens = self.context.step.num_tokens
        shape = list(self.shape)
        shape[self.shape.index(NUM_TOKENS)] = tokens
        # Memory of their own: some models change their embeddings in place.
        return torch.zeros(shape, dtype=self.dtype, device=self.context.step.token_ids.device)


class _Border:
    """Stands for the forward of a stage's first or last layer; ``inner`` is the layer's own."""

    def __init__(self, layer: nn.Module) -> None:
        self.inner: Any = layer.forward


class _Receiving(_Border):
    """Lets the hidden states from the stage before in."""

    def __init__(self, layer: nn.Module, context: ShardContext) -> None:
        super().__init__(layer)
        self._context = context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._context.inbound is not None
        if args:
            return self.inner(self._context.inbound, *args[1:], **kwargs)
        return self.inner(**{**kwargs, "hidden_states": self._context.inbound})


class _Leaving(_Border):
    """Leaves the model's forward with what the layer gives."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        raise StageOutput(output if isinstance(output, torch.Tensor) else output[0])


def own_forward(layer: nn.Module) -> Callable[..., Any]:
    """What a layer computes, whatever its stage does before and after."""
    forward: object = layer.forward
    while isinstance(forward, _Border):
        forward = forward.inner
    assert callable(forward)
    return forward


def replace_own_forward(layer: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a layer compute by ``forward``, within what its stage does before and after."""
    border = layer.__dict__.get("forward")
    if not isinstance(border, _Border):
        replace_forward(layer, forward)
        return
    while isinstance(border.inner, _Border):
        border = border.inner
    border.inner = forward


def keep_stage(
    model: PreTrainedModel, probe: Probe, spec: ShardSpec, context: ShardContext
) -> None:
    """Leave in ``model`` only what the stage owns. Call before anything else is replaced."""
    if spec.pp_size == 1:
        return
    layers = model.get_submodule(probe.layers_name)
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        if not spec.first_layer <= index < spec.end_layer:
            layers[index] = _PassLayer(layer, probe.returns_tuple)
    if not spec.is_first:
        first = layers[spec.first_layer]
        replace_forward(first, _Receiving(first, context))
        _remove(model, probe.before_layers, probe, context)
    if not spec.is_last:
        last = layers[spec.end_layer - 1]
        replace_forward(last, _Leaving(last))
        _remove(model, probe.after_layers, probe, context)


def _remove(model: PreTrainedModel, names: list[str], probe: Probe, context: ShardContext) -> None:
    dtype = model.dtype
    for name in names:
        owner, _, leaf = name.rpartition(".")
        absent = _Absent(probe.output_shapes[name], dtype, context)
        setattr(model.get_submodule(owner), leaf, absent)
