"""A decoder layer as a flat list of fused operations, in place of its transformers forward.

Most decoder layers are one arrangement: norms, one attention with rotary positions, one MLP, two
residuals. A table names the arrangements; what a layer really does is not believed but seen: its
own forward runs once on drawn input with the attention watched, and the flat form is taken only
where it gives the same queries, keys, values and output. Every other layer keeps its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spanwise.device.linear import Linear, PlainLinear
from spanwise.model import seams
from spanwise.model.attention import LayerAttention
from spanwise.model.parallel import RowParallel
from spanwise.model.stage import own_forward

MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]
Tables = tuple[torch.Tensor, torch.Tensor]
_NUM_ROWS = 3
# Of float32, what stays in a core's cache from one operation to the next.
_CACHED_VALUES = 1 << 16
# Of the largest value: what rounding in another order may change.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class _Norms:
    """What the norms of a layer are called; empty for none at that place."""

    before_attention: str = ""
    after_attention: str = ""
    before_mlp: str = ""
    after_mlp: str = ""

    @property
    def names(self) -> set[str]:
        """Those that are there."""
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return {name for name in places if name}


_ARRANGEMENTS = (
    _Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    _Norms(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    _Norms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"),
    _Norms(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
)
_NO_OPERATION = (nn.Dropout, nn.Identity)


class _NoMatchError(Exception):
    """The layer is none of the arrangements."""


# -- operations -----------------------------------------------------------------------------------


class RmsNorm:
    """Root mean square norm (arXiv:1910.07467) over the last dim, computed in float32.

    A weight of the input's dtype is applied after the rounding to it, one in float32 before.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps
        self._dim = weight.shape[0]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., dim]`` to the same."""
        if hidden.numel() <= _CACHED_VALUES:
            return self._norm(hidden)
        rows = max(1, _CACHED_VALUES * hidden.shape[0] // hidden.numel())
        return torch.cat([self._norm(part) for part in torch.split(hidden, rows)])

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        exact = hidden.float()
        # torch's own rms_norm takes twice the time for many rows.
        scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = scale.square_().div_(self._dim).add_(self._eps).rsqrt_()
        normed = exact * scale if exact is hidden else exact.mul_(scale)
        if self._weight.dtype == hidden.dtype:
            return normed.to(hidden.dtype).mul_(self._weight)
        return normed.mul_(self._weight).to(hidden.dtype)


class Rotary:
    """Rotary positions (arXiv:2104.09864) for halves of a head, from tables made once a step."""

    def __init__(self) -> None:
        self._made_for: Tables | None = None
        self._cos = self._sin = torch.empty(0)

    def __call__(self, heads: torch.Tensor, tables: Tables) -> torch.Tensor:
        """``[tokens, heads, dim]`` to the same; tables ``[1, tokens, rotated dim]``."""
        if self._made_for is not tables:
            self._make(tables)
        dim = self._cos.shape[-1]
        if dim == heads.shape[-1]:
            return self._rotate(heads)
        return torch.cat((self._rotate(heads[..., :dim]), heads[..., dim:]), dim=-1)

    def _make(self, tables: Tables) -> None:
        cos, sin = (table[0][:, None] for table in tables)
        below, above = sin.chunk(2, dim=-1)
        self._cos, self._sin = cos, torch.cat((-below, above), dim=-1)
        self._made_for = tables

    def _rotate(self, heads: torch.Tensor) -> torch.Tensor:
        below, above = heads.chunk(2, dim=-1)
        return (heads * self._cos).addcmul_(torch.cat((above, below), dim=-1), self._sin)


class GatedMlp:
    """Activation of the gate times the rest, both from one product."""

    def __init__(
        self,
        gate_up: Linear,
        activation: Callable[[torch.Tensor], torch.Tensor],
        down: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._gate_up, self._activation, self._down = gate_up, activation, down

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)
        return self._down(self._activation(gate).mul_(up))


class OwnMlp:
    """The layer's own module: routed experts, for one."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        return _first(self._module(hidden[None]))[0]


@dataclass(frozen=True)
class _AttentionOptions:
    """What a layer hands to the attention function beside tensors of the step."""

    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None


class FlatAttention:
    """Queries, keys and values from one product, their norms, rotary positions, the cache."""

    def __init__(
        self,
        qkv: Linear,
        out: Callable[[torch.Tensor], torch.Tensor],
        heads: tuple[int, int, int],
        norms: tuple[RmsNorm | None, RmsNorm | None],
        rotary: Rotary | None,
    ) -> None:
        self._qkv, self._out, self._norms, self._rotary = qkv, out, norms, rotary
        self._num_query, self._num_kv, self._dim = heads
        self.options = _AttentionOptions(None, None, None)
        self.handler: LayerAttention | _Watch | None = None

    def __call__(self, hidden: torch.Tensor, tables: Tables | None) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        heads = self._qkv(hidden).view(hidden.shape[0], -1, self._dim)
        num_rotated = self._num_query + self._num_kv
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        query_norm, key_norm = self._norms
        if query_norm is not None and key_norm is not None:
            query, key = rotated[:, : self._num_query], rotated[:, self._num_query :]
            rotated = torch.cat((query_norm(query), key_norm(key)), dim=1)
        if self._rotary is not None:
            assert tables is not None
            rotated = self._rotary(rotated, tables)
        query, key = rotated[:, : self._num_query], rotated[:, self._num_query :]
        assert self.handler is not None
        self.handler.write(key, value)
        options = self.options
        mixed = self.handler.attend_tokens(query, options.scaling, options.softcap, options.sinks)
        return self._out(mixed.flatten(1))


class FlatLayer:
    """One decoder layer; stands for its forward. ``replaced``: the linears it computes itself."""

    def __init__(
        self,
        attention: FlatAttention,
        mlp: Callable[[torch.Tensor], torch.Tensor],
        norms: Mapping[str, RmsNorm],
        places: _Norms,
        returns_tuple: bool,
        replaced: Sequence[nn.Module],
    ) -> None:
        self.attention, self.mlp, self._returns_tuple = attention, mlp, returns_tuple
        self.replaced = tuple(replaced)
        self._before_attention = norms.get(places.before_attention)
        self._after_attention = norms.get(places.after_attention)
        self._before_mlp = norms.get(places.before_mlp)
        self._after_mlp = norms.get(places.after_mlp)

    def __call__(
        self, hidden_states: torch.Tensor, position_embeddings: Tables | None = None, **_: Any
    ) -> Any:
        """``[1, tokens, hidden]`` to the same, in a tuple where the layer gave one."""
        hidden = hidden_states[0]
        mixed = self.attention(_normed(self._before_attention, hidden), position_embeddings)
        hidden = hidden + _normed(self._after_attention, mixed)
        mixed = self.mlp(_normed(self._before_mlp, hidden))
        hidden = hidden + _normed(self._after_mlp, mixed)
        return (hidden[None],) if self._returns_tuple else hidden[None]


def _normed(norm: RmsNorm | None, hidden: torch.Tensor) -> torch.Tensor:
    return hidden if norm is None else norm(hidden)


# -- from modules ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerParts:
    """What is needed to rebuild a layer: its module, its attention's name in it, and its handler.

    ``head_dim``: of queries, keys and values alike; ``rotated_dim``: of the rotary tables.
    """

    layer: nn.Module
    attention: str
    handler: LayerAttention
    head_dim: int
    rotated_dim: int
    returns_tuple: bool


class Flattener:
    """Makes flat layers of the layers of one shard; a kind of layer is checked once."""

    def __init__(self, hidden_size: int, make: MakeLinear) -> None:
        self._hidden_size, self._make = hidden_size, make
        self._rotary = Rotary()
        self._seen: dict[object, tuple[bool, _AttentionOptions] | None] = {}

    def flatten(self, parts: LayerParts) -> FlatLayer | None:
        """The flat form of a layer; None where it has none that gives the same."""
        kind = _kind(parts.layer)
        if kind in self._seen:
            return self._rebuild(parts, self._seen[kind])
        self._seen[kind] = None
        try:
            candidates = [self._build(parts, rotates, PlainLinear) for rotates in (True, False)]
            own = _watch(parts, self._hidden_size)
        except _NoMatchError:
            return None
        for rotates, flat in zip((True, False), candidates, strict=True):
            if own.is_given_by(flat):
                self._seen[kind] = (rotates, own.options)
                break
        return self._rebuild(parts, self._seen[kind])

    def _rebuild(
        self, parts: LayerParts, found: tuple[bool, _AttentionOptions] | None
    ) -> FlatLayer | None:
        if found is None:
            return None
        try:
            flat = self._build(parts, found[0], self._make)
        except _NoMatchError:
            return None
        flat.attention.options = _own_options(found[1], parts)
        flat.attention.handler = parts.handler
        return flat

    def _build(self, parts: LayerParts, rotates: bool, make: MakeLinear) -> FlatLayer:
        children = dict(parts.layer.named_children())
        others = {
            name
            for name, child in children.items()
            if name not in (parts.attention, "mlp") and not isinstance(child, _NO_OPERATION)
        }
        places = next((norms for norms in _ARRANGEMENTS if norms.names == others), None)
        if places is None or "mlp" not in children or list(parts.layer.parameters(recurse=False)):
            raise _NoMatchError
        linears = _Linears(make)
        rotary = self._rotary if rotates else None
        attention = _attention(children[parts.attention], parts, rotary, linears)
        norms = {name: _norm(children[name]) for name in places.names}
        mlp = _mlp(children["mlp"], linears)
        return FlatLayer(attention, mlp, norms, places, parts.returns_tuple, linears.replaced)


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

    def __init__(self, make: MakeLinear) -> None:
        self._make = make
        self.replaced: list[nn.Module] = []

    def joined(self, linears: Sequence[nn.Linear]) -> Linear:
        """Linears of one input as one, their columns side by side."""
        self.replaced += linears
        weight = torch.cat(tuple(linear.weight for linear in linears))
        if all(linear.bias is None for linear in linears):
            return self._make(weight, None)
        biases = tuple(
            torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
            for linear in linears
        )
        return self._make(weight, torch.cat(biases))

    def back(self, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """A linear back to the hidden states, whose products ranks may have to add up."""
        self.replaced.append(module)
        forward = module.__dict__.get("forward")
        if not isinstance(forward, RowParallel):
            linear = _plain_linear(module)
            return self._make(linear.weight, linear.bias)
        assert isinstance(module, nn.Linear)
        own = RowParallel(module, forward.context)
        own.product = self._make(module.weight, None)
        return own


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
        raise _NoMatchError
    dim, kv_heads = parts.head_dim, parts.handler.spec.num_heads
    total = sum(linear.weight.shape[0] for linear in used)
    if total % dim:
        raise _NoMatchError
    query, key = (None if norm is None else _norm(norm, dim) for norm in norms)
    return FlatAttention(
        linears.joined(used),
        linears.back(out),
        (total // dim - 2 * kv_heads, kv_heads, dim),
        (query, key),
        rotary,
    )


def _mlp(module: nn.Module, linears: _Linears) -> Callable[[torch.Tensor], torch.Tensor]:
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
    gate_up = linears.joined([_plain_linear(linear) for linear in used])
    return GatedMlp(gate_up, activation, linears.back(down))


def _with_weights(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if list(child.parameters())}


def _plain_linear(module: nn.Module | None) -> nn.Linear:
    """A linear that computes by itself."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        raise _NoMatchError
    return module


def _norm(module: nn.Module, dim: int | None = None) -> RmsNorm:
    """The norm a module computes: by its weight, or by one more than it."""
    eps: object = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight: object = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        raise _NoMatchError
    if "forward" in module.__dict__ or (dim or weight.shape[0]) != weight.shape[0]:
        raise _NoMatchError
    drawn = _draw(_NUM_ROWS, weight.shape[0], like=weight)
    for scale in (weight, 1.0 + weight.float()):
        norm = RmsNorm(scale.detach(), eps)
        if _is_close(norm(drawn), module(drawn)):
            return norm
    raise _NoMatchError


# -- watching -------------------------------------------------------------------------------------


class _Watch(seams.CacheShape):
    """Stands for cache and attention while a layer shows what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.options = _AttentionOptions(None, None, None)
        self.given: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep ``[1, heads, tokens, dim]`` as ``[tokens, heads, dim]``."""
        self.write(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        return key_states, value_states

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep ``[tokens, heads, dim]``."""
        self.given += [key, value]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Keep what is given and answer the queries themselves, which serve as any answer would."""
        self.options = _AttentionOptions(scaling, softcap, s_aux)
        return self.attend_tokens(query[0].transpose(0, 1), scaling, softcap, s_aux)[None]

    def attend_tokens(self, query: torch.Tensor, *_: Any) -> torch.Tensor:
        """As ``LayerAttention.attend_tokens``."""
        self.given.append(query)
        return query


@dataclass(frozen=True)
class _Shown:
    """What a layer's own forward did with drawn input; ``mlp``: what its MLP took and gave."""

    hidden: torch.Tensor
    tables: Tables
    options: _AttentionOptions
    given: Sequence[torch.Tensor]
    mlp: tuple[torch.Tensor, torch.Tensor]
    output: torch.Tensor

    def is_given_by(self, flat: FlatLayer) -> bool:
        """Whether a flat layer gives the same keys, values, queries and output.

        Its own module in place of a flat MLP is only asked for its input: of two inputs that differ
        by rounding a router may send one elsewhere.
        """
        watch, taken = _Watch(), list[torch.Tensor]()
        flat.attention.handler = watch
        seen = [*self.given, self.output]
        if isinstance(flat.mlp, OwnMlp):
            seen.insert(3, self.mlp[0])

            def repeat(hidden: torch.Tensor) -> torch.Tensor:
                taken.append(hidden)
                return self.mlp[1]

            flat.mlp = repeat
        output = _first(flat(self.hidden, self.tables))
        pairs = zip([*watch.given, *taken, output], seen, strict=True)
        return all(own.shape == wanted.shape and _is_close(own, wanted) for own, wanted in pairs)


def _watch(parts: LayerParts, hidden_size: int) -> _Shown:
    """Run the layer's own forward. Raises _NoMatchError where it attends otherwise, or twice.

    Or where it makes something of positions itself: a scale that grows with them, for one.
    """
    module, mlp = parts.layer.get_submodule(parts.attention), getattr(parts.layer, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise _NoMatchError
    like = next(module.parameters())
    hidden = _draw(1, _NUM_ROWS, hidden_size, like=like)
    tables = _draw_tables(parts, like)
    watch, passed = _Watch(), list[torch.Tensor]()
    # Rotary tables are the only way in which a flat layer knows positions.
    reached: list[bool] = []
    positions = seams.seen_positions(torch.arange(_NUM_ROWS, device=like.device)[None], reached)
    hook = mlp.register_forward_hook(
        lambda _, given, output: passed.extend((given[0][0], _first(output)[0]))
    )
    seams.set_handler(module, watch)
    try:
        output = own_forward(parts.layer)(
            hidden,
            attention_mask=None,
            position_ids=positions,
            past_key_values=watch,
            use_cache=True,
            position_embeddings=tables,
        )
    except (TypeError, RuntimeError, ValueError, IndexError) as error:  # it wants other arguments
        raise _NoMatchError from error
    finally:
        seams.set_handler(module, parts.handler)
        hook.remove()
    if len(watch.given) != 3 or len(passed) != 2 or reached:
        raise _NoMatchError
    return _Shown(
        hidden, tables, watch.options, watch.given, (passed[0], passed[1]), _first(output)
    )


def _draw_tables(parts: LayerParts, like: torch.Tensor) -> Tables:
    angles = _draw(1, _NUM_ROWS, parts.rotated_dim // 2, like=like).float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _own_options(seen: _AttentionOptions, parts: LayerParts) -> _AttentionOptions:
    """The options for another layer of the kind: sinks are each layer's own."""
    if seen.sinks is None:
        return seen
    module = parts.layer.get_submodule(parts.attention)
    return _AttentionOptions(seen.scaling, seen.softcap, module.get_parameter("sinks"))


def _draw(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Normal numbers, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return found


def _is_close(own: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether two results differ by no more than rounding."""
    worst = (own.float() - seen.float()).abs().max()
    return bool(worst <= _TOLERANCE[seen.dtype] * seen.float().abs().max())
