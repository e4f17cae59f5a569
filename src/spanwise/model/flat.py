"""A decoder layer as a flat list of fused operations.

What a layer of one of the usual arrangements consists of; ``model/flatten.py`` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from spanwise.device import fused_cuda, native
from spanwise.device.linear import Linear, fill_rows, wants_filled
from spanwise.device.rotary import Angles, Rotary, Tables

# Of float32, what stays in a core's cache from one operation to the next.
_CACHED_VALUES = 1 << 16


class Handler(Protocol):
    """Where a layer's keys and values go, and who answers its queries: ``LayerAttention``."""

    def place(self, heads: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """Turn the queries and keys of ``[tokens, query + 2 * kv heads, dim]``, store the rest.

        Returns the queries.
        """
        ...

    def attend_tokens(
        self,
        query: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """``[tokens, heads, dim]`` to ``[tokens, heads, value_dim]``."""
        ...


@dataclass(frozen=True)
class Norms:
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


class RmsNorm:
    """Root mean square norm (arXiv:1910.07467) over the last dim, computed in float32.

    A weight of the input's dtype is applied after the rounding to it, one in float32 before.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._mean, self.eps = weight, 1.0 / weight.shape[0], eps
        self._eps = torch.full((1, 1), eps, device=weight.device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., dim]`` to the same."""
        if native.takes(hidden):
            return native.rms_norm(hidden, self._weight, self.eps)
        if hidden.device.type == "cuda":
            return fused_cuda.rms_norm(hidden, self._weight, self.eps)
        if hidden.numel() <= _CACHED_VALUES:
            return self._norm(hidden)
        rows = max(1, _CACHED_VALUES * hidden.shape[0] // hidden.numel())
        return torch.cat([self._norm(part) for part in torch.split(hidden, rows)])

    def in_place(self, hidden: torch.Tensor) -> None:
        """Put the norm of ``[tokens, heads, dim]`` in its place."""
        if native.takes(hidden):
            native.rms_norm(hidden, self._weight, self.eps, out=hidden)
        else:
            hidden.copy_(self(hidden))

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        exact = hidden.float()
        # torch's own rms_norm takes twice the time for many rows.
        size = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, size, size, value=self._mean).rsqrt_()
        normed = exact * scale if exact is hidden else exact.mul_(scale)
        if self._weight.dtype == hidden.dtype:
            return normed.to(hidden.dtype).mul_(self._weight)
        return normed.mul_(self._weight).to(hidden.dtype)


class Projection(Protocol):
    """A linear back to the hidden states, on one rank or over several."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, in]`` to ``[rows, hidden]``."""
        ...

    def add_to(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``residual`` ``[rows, hidden]`` and the product of ``hidden`` ``[rows, in]``."""
        ...


class GatedMlp:
    """Up and gate, activation, down."""

    def __init__(self, gate: Callable[[torch.Tensor], torch.Tensor], down: Projection) -> None:
        self._gate, self._down = gate, down

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden]`` to the same."""
        return self._down(self._gate(hidden))

    def add_to(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The same, and the residual."""
        return self._down.add_to(residual, self._gate(hidden))


class OwnMlp:
    """The layer's own module: routed experts, for one."""

    def __init__(self, module: Callable[[torch.Tensor], Any]) -> None:
        self.module = module

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        return first_of(self.module(hidden[None]))[0]

    def add_to(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The same, and the residual."""
        return residual + self(hidden)


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer hands to the attention function beside tensors of the step."""

    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None


class FlatAttention:
    """Queries, keys and values from one product, their norms, rotary positions, the cache."""

    def __init__(
        self,
        qkv: Linear,
        out: Projection,
        heads: tuple[int, int, int],
        norms: tuple[RmsNorm | None, RmsNorm | None],
        rotary: Rotary | None,
    ) -> None:
        self._qkv, self._out, self._norms, self._rotary = qkv, out, norms, rotary
        self._num_query, self._num_kv, self._dim = heads
        self.options = AttentionOptions(None, None, None)
        self.handler: Handler | None = None

    def __call__(self, hidden: torch.Tensor, tables: Tables | None, count: int) -> torch.Tensor:
        """``[rows, hidden]`` to the same; the first ``count`` rows are tokens."""
        return self._out(self._mixed(hidden, tables, count))

    def add_to(
        self, residual: torch.Tensor, hidden: torch.Tensor, tables: Tables | None, count: int
    ) -> torch.Tensor:
        """The same, and the residual."""
        return self._out.add_to(residual, self._mixed(hidden, tables, count))

    def _mixed(self, hidden: torch.Tensor, tables: Tables | None, count: int) -> torch.Tensor:
        heads = self._qkv(hidden)[:count].view(count, -1, self._dim)
        query_norm, key_norm = self._norms
        if query_norm is not None and key_norm is not None:
            query_norm.in_place(heads[:, : self._num_query])
            key_norm.in_place(heads[:, self._num_query : self._num_query + self._num_kv])
        angles = None
        if self._rotary is not None:
            assert tables is not None
            angles = self._rotary.angles(tables)
        assert self.handler is not None
        query = self.handler.place(heads, angles)
        options = self.options
        mixed = self.handler.attend_tokens(query, options.scaling, options.softcap, options.sinks)
        return mixed.flatten(1) if hidden.shape[0] == count else fill_rows(mixed.flatten(1))


class FlatLayer:
    """One decoder layer; stands for its forward. ``replaced``: the linears it computes itself.

    ``fills``: its linears want filled rows, which go through the whole layer then.
    """

    def __init__(
        self,
        attention: FlatAttention,
        mlp: GatedMlp | OwnMlp,
        norms: Mapping[str, RmsNorm],
        places: Norms,
        returns_tuple: bool,
        replaced: Sequence[nn.Module],
        fills: bool,
    ) -> None:
        self.attention, self.mlp, self._returns_tuple = attention, mlp, returns_tuple
        self._fills = fills
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
        count = hidden.shape[0]
        if self._fills and wants_filled(hidden):
            hidden = fill_rows(hidden)
        normed = _normed(self._before_attention, hidden)
        if self._after_attention is None:
            hidden = self.attention.add_to(hidden, normed, position_embeddings, count)
        else:
            mixed = self.attention(normed, position_embeddings, count)
            hidden = hidden + self._after_attention(mixed)
        normed = _normed(self._before_mlp, hidden)
        if self._after_mlp is None:
            hidden = self.mlp.add_to(hidden, normed)
        else:
            hidden = hidden + self._after_mlp(self.mlp(normed))
        hidden = hidden[None, :count]
        return (hidden,) if self._returns_tuple else hidden


def _normed(norm: RmsNorm | None, hidden: torch.Tensor) -> torch.Tensor:
    return hidden if norm is None else norm(hidden)


def first_of(output: Any) -> torch.Tensor:
    """The hidden states of what a module gave: itself, or the first of a tuple."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return found
