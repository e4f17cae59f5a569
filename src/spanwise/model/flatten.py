"""Makes flat layers (``model/flat.py``) of decoder layers, in place of their own forwards.

Most decoder layers are one arrangement: norms, one attention with rotary positions, one MLP, two
residuals. A table names the arrangements; what a layer really does is not believed but seen: its
own forward runs once on drawn input with the attention watched, and the flat form is taken only
where it gives the same queries, keys, values and output. Every other layer keeps its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from spanwise.device.activations import Activation, activation_name
from spanwise.device.linear import (
    JoinedGate,
    Linear,
    PackedGate,
    PackedLinear,
    PlainLinear,
)
from spanwise.device.rotary import Rotary
from spanwise.model.flat import (
    AttentionOptions,
    FlatAttention,
    FlatLayer,
    GatedMlp,
    Norms,
    OwnMlp,
    Projection,
    RmsNorm,
)
from spanwise.model.parallel import RowParallel
from spanwise.model.watch import (
    NUM_ROWS,
    LayerParts,
    NoMatchError,
    draw,
    is_close,
    watch_layer,
)

MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]


@dataclass(frozen=True)
class LinearForm:
    """How linears are made of a weight and a bias, and which weights are packed so."""

    make: MakeLinear
    packs: Callable[[torch.Tensor], bool]


_PLAIN = LinearForm(PlainLinear, lambda _: False)

_ARRANGEMENTS = (
    Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    Norms(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    Norms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"),
    Norms(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
)
_NO_OPERATION = (nn.Dropout, nn.Identity)


class Flattener:
    """Makes flat layers of the layers of one shard; a kind of layer is checked once."""

    def __init__(self, hidden_size: int, form: LinearForm) -> None:
        self._hidden_size, self._form = hidden_size, form
        self._rotary = Rotary()
        self._seen: dict[object, tuple[bool, AttentionOptions] | None] = {}

    def flatten(self, parts: LayerParts) -> FlatLayer | None:
        """The flat form of a layer; None where it has none that gives the same."""
        kind = _kind(parts.layer)
        if kind in self._seen:
            return self._rebuild(parts, self._seen[kind])
        self._seen[kind] = None
        try:
            candidates = [self._build(parts, rotates, _PLAIN) for rotates in (True, False)]
            own = watch_layer(parts, self._hidden_size)
        except NoMatchError:
            return None
        for rotates, flat in zip((True, False), candidates, strict=True):
            if own.is_given_by(flat):
                self._seen[kind] = (rotates, own.options)
                break
        return self._rebuild(parts, self._seen[kind])

    def _rebuild(
        self, parts: LayerParts, found: tuple[bool, AttentionOptions] | None
    ) -> FlatLayer | None:
        if found is None:
            return None
        try:
            flat = self._build(parts, found[0], self._form)
        except NoMatchError:
            return None
        flat.attention.options = _own_options(found[1], parts)
        flat.attention.handler = parts.handler
        return flat

    def _build(self, parts: LayerParts, rotates: bool, form: LinearForm) -> FlatLayer:
        children = dict(parts.layer.named_children())
        others = {
            name
            for name, child in children.items()
            if name not in (parts.attention, "mlp") and not isinstance(child, _NO_OPERATION)
        }
        places = next((norms for norms in _ARRANGEMENTS if norms.names == others), None)
        if places is None or "mlp" not in children or list(parts.layer.parameters(recurse=False)):
            raise NoMatchError
        linears = _Linears(form)
        rotary = self._rotary if rotates else None
        attention = _attention(children[parts.attention], parts, rotary, linears)
        norms = {name: _norm(children[name]) for name in places.names}
        mlp = _mlp(children["mlp"], linears)
        fills = linears.has_packed and isinstance(mlp, GatedMlp)
        returns_tuple, replaced = parts.returns_tuple, linears.replaced
        return FlatLayer(attention, mlp, norms, places, returns_tuple, replaced, fills)


def _kind(layer: nn.Module) -> object:
    """What layers have in common whose forwards do the same: code, settings and shapes."""
    found = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in module.__dict__.items()
            if isinstance(value, bool | int | float | str) and key != "layer_idx"
        }
        shapes = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        # That of the layer itself may be its stage's.
        forward = type(module.__dict__.get("forward")) if name else None
        found.append((name, type(module), tuple(settings.items()), tuple(shapes.items()), forward))
    return tuple(found)


class _Linears:
    """Makes the linears of one layer, and notes which of its modules they replace."""

    def __init__(self, form: LinearForm) -> None:
        self._form = form
        self.replaced: list[nn.Module] = []
        self.has_packed = False

    def joined(self, linears: Sequence[nn.Linear]) -> Linear:
        """Linears of one input as one, their columns side by side."""
        self.replaced += linears
        return self._made(*_joined(linears))

    def gate(
        self, linears: Sequence[nn.Linear], activation: Activation
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Gate and up, two linears or one of both."""
        self.replaced += linears
        weight, bias = _joined(linears)
        gate_weight, up_weight = weight.chunk(2)
        name = activation_name(activation) if self._form.packs(gate_weight) else None
        if name is None:
            return JoinedGate(self._made(weight, bias), activation)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        gate, up = self._made(gate_weight, gate_bias), self._made(up_weight, up_bias)
        assert isinstance(gate, PackedLinear) and isinstance(up, PackedLinear)
        return PackedGate(gate, up, name)

    def back(self, module: nn.Module) -> Projection:
        """A linear back to the hidden states, whose products ranks may have to add up."""
        self.replaced.append(module)
        forward = module.__dict__.get("forward")
        if not isinstance(forward, RowParallel):
            linear = _plain_linear(module)
            return self._made(linear.weight, linear.bias)
        assert isinstance(module, nn.Linear)
        own = RowParallel(module, forward.context)
        own.product = self._made(module.weight, None)
        return own

    def _made(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        linear = self._form.make(weight, bias)
        self.has_packed |= isinstance(linear, PackedLinear)
        return linear


def _joined(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights and biases of linears of one input, their columns side by side."""
    weight = torch.cat(tuple(linear.weight for linear in linears))
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = tuple(
        torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
        for linear in linears
    )
    return weight, torch.cat(biases)


def _attention(
    module: nn.Module, parts: LayerParts, rotary: Rotary | None, linears: _Linears
) -> FlatAttention:
    children = _with_weights(module)
    norms = (children.pop("q_norm", None), children.pop("k_norm", None))
    out = children.pop("o_proj", None)
    into = [children.pop(name, None) for name in ("q_proj", "k_proj", "v_proj")]
    packed = children.pop("qkv_proj", None)
    used = [_plain_linear(linear) for linear in (into if packed is None else [packed])]
    if children or out is None or (norms[0] is None) != (norms[1] is None):
        raise NoMatchError
    dim, kv_heads = parts.head_dim, parts.handler.spec.num_heads
    total = sum(linear.weight.shape[0] for linear in used)
    if total % dim:
        raise NoMatchError
    query, key = (None if norm is None else _norm(norm, dim) for norm in norms)
    return FlatAttention(
        linears.joined(used),
        linears.back(out),
        (total // dim - 2 * kv_heads, kv_heads, dim),
        (query, key),
        rotary,
    )


def _mlp(module: nn.Module, linears: _Linears) -> GatedMlp | OwnMlp:
    children = _with_weights(module)
    down = children.pop("down_proj", None)
    packed = children.pop("gate_up_proj", None)
    into = [children.pop(name, None) for name in ("gate_proj", "up_proj")]
    activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    used = into if packed is None else [packed]
    is_gated = not children and type(down) is nn.Linear and activation is not None
    if not is_gated or list(module.parameters(recurse=False)) or None in used:
        return OwnMlp(module)
    assert down is not None and activation is not None
    gate = linears.gate([_plain_linear(linear) for linear in used], activation)
    return GatedMlp(gate, linears.back(down))


def _with_weights(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if list(child.parameters())}


def _plain_linear(module: nn.Module | None) -> nn.Linear:
    """A linear that computes by itself."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        raise NoMatchError
    return module


def _norm(module: nn.Module, dim: int | None = None) -> RmsNorm:
    """The norm a module computes: by its weight, or by one more than it."""
    eps: object = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight: object = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        raise NoMatchError
    if "forward" in module.__dict__ or (dim or weight.shape[0]) != weight.shape[0]:
        raise NoMatchError
    drawn = draw(NUM_ROWS, weight.shape[0], like=weight)
    for scale in (weight, 1.0 + weight.float()):
        norm = RmsNorm(scale.detach(), eps)
        if is_close(norm(drawn), module(drawn)):
            return norm
    raise NoMatchError


def _own_options(seen: AttentionOptions, parts: LayerParts) -> AttentionOptions:
    """The options for another layer of the kind: sinks are each layer's own."""
    if seen.sinks is None:
        return seen
    module = parts.layer.get_submodule(parts.attention)
    return AttentionOptions(seen.scaling, seen.softcap, module.get_parameter("sinks"))
