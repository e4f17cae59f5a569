"""Cutting a built model to one rank's share of its stage, still without memory.

The tables name the parts of an attention module; whether a name means what the table says is
checked against the shapes the probe saw. MLPs are recognised by structure (linears that go to a
width and one that comes back), routed experts by the seam they are reached through. A part that is
not understood stays whole on every rank: more memory, the same tokens; it is named in the facts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from spanwise.layout.heads import HeadShare, kv_index, split_heads
from spanwise.layout.split import split_evenly
from spanwise.model import tables
from spanwise.model.checkpoint import TensorCut
from spanwise.model.context import ShardContext
from spanwise.model.experts import ExpertSplit
from spanwise.model.parallel import (
    GatheredLinear,
    GatheredNorm,
    RowParallel,
    VocabParallelEmbedding,
    features,
    is_linear,
    replace_forward,
)
from spanwise.model.probe import AttentionSeen, Probe
from spanwise.types.cache import LayerCache
from spanwise.types.worker import ShardSpec

Ranges = tuple[tuple[int, int], ...]
_T = TypeVar("_T")


@dataclass(frozen=True)
class LayerShare:
    """What a rank's attention of one layer holds: cache, and the KV head each query reads."""

    cache: LayerCache
    kv_index: tuple[int, ...] | None


@dataclass
class Cut:
    """The result of cutting: ``tensors`` by parameter name, what of it is kept."""

    tensors: dict[str, tuple[TensorCut, ...]] = field(default_factory=dict)
    layers: dict[int, LayerShare] = field(default_factory=dict)
    experts: dict[str, tuple[range, ExpertSplit]] = field(default_factory=dict)
    replicated: list[str] = field(default_factory=list)


class NotUnderstoodError(Exception):
    """A part whose names or shapes do not say how to cut it; it stays whole."""


class Cutter:
    """Cuts the owned layers of one model in place for one tensor-parallel rank."""

    def __init__(
        self, model: PreTrainedModel, probe: Probe, spec: ShardSpec, context: ShardContext
    ) -> None:
        self.model, self.probe, self.spec, self.context = model, probe, spec, context
        self.modules = dict(model.named_modules())
        self.size, self.rank = spec.tp_size, spec.tp_rank
        self.cut = Cut()

    def run(self) -> Cut:
        """Cut every owned layer, and the vocabulary on the stages that hold it."""
        for layer in range(self.spec.first_layer, self.spec.end_layer):
            self._layer(layer)
        if self.size > 1:
            self._vocabulary()
        return self.cut

    def _layer(self, layer: int) -> None:
        seen = self.probe.attention[layer]
        name = f"{self.probe.layers_name}.{layer}"
        whole = LayerShare(seen.cache, None)
        if self.size == 1:
            self.cut.layers[layer] = whole
        else:
            self.cut.layers[layer] = (
                self._attempt(seen.name, lambda: self._attention(seen)) or whole
            )
            self._mlps(name, seen.name)
        for experts in (n for n in self.probe.experts if n.startswith(f"{name}.")):
            self._experts(experts)

    def _attempt(self, name: str, act: Callable[[], _T]) -> _T | None:
        try:
            return act()
        except NotUnderstoodError as reason:
            self.cut.replicated.append(f"{name}: {reason}")
            return None

    def _keep(self, name: str, dim: int, ranges: Ranges) -> None:
        """Keep ``ranges`` of a tensor's ``dim``, and shrink the (memoryless) tensor to them."""
        owner, _, leaf = name.rpartition(".")
        module = self.modules[owner]
        tensor = getattr(module, leaf)
        shape = list(tensor.shape)
        shape[dim] = sum(end - start for start, end in ranges)
        empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
        setattr(module, leaf, nn.Parameter(empty, requires_grad=False))
        self.cut.tensors[name] = (*self.cut.tensors.get(name, ()), TensorCut(dim, ranges))

    # -- linears ---------------------------------------------------------------------------------

    def _columns(self, name: str, ranges: Ranges) -> None:
        """Keep output columns of a linear."""
        module = self.modules[name]
        out_dim = 0 if isinstance(module, nn.Linear) else 1
        self._keep(f"{name}.weight", out_dim, ranges)
        if module.bias is not None:
            self._keep(f"{name}.bias", 0, ranges)
        width = sum(end - start for start, end in ranges)
        for attribute in ("out_features", "nf"):
            if hasattr(module, attribute):
                setattr(module, attribute, width)

    def _rows(self, name: str, ranges: Ranges) -> None:
        """Keep input rows of a linear; the products of all ranks are summed."""
        module = self.modules[name]
        self._keep(f"{name}.weight", 1 if isinstance(module, nn.Linear) else 0, ranges)
        replace_forward(module, RowParallel(module, self.context))

    # -- attention -------------------------------------------------------------------------------

    def _attention(self, seen: AttentionSeen) -> LayerShare:
        plan = _AttentionPlan(self.modules, seen, self.size, self.rank)
        for name, ranges in plan.columns.items():
            self._columns(name, ranges)
        for name, ranges in plan.rows.items():
            self._rows(name, ranges)
        for name, ranges in plan.parameters.items():
            self._keep(name, 0, ranges)
        for name, shares in plan.norms.items():
            module = self.modules[name]
            replace_forward(module, GatheredNorm(module, self.context, shares, self.rank))
        plan.set_counts(self.modules[seen.name])
        return plan.share()

    # -- MLP and experts -------------------------------------------------------------------------

    def _mlps(self, layer: str, attention: str) -> None:
        inside = [
            (name, module)
            for name, module in self.modules.items()
            if name == layer or name.startswith(f"{layer}.")
        ]
        for name, module in inside:
            if name == attention or name.startswith(f"{attention}.") or name in self.probe.experts:
                continue
            linears = {n: m for n, m in module.named_children() if is_linear(m)}
            back = _back_projection(linears)
            if back is None:
                continue
            between = {n for n, m in module.named_children() if _has_vectors(m)} - set(linears)
            unknown = between - tables.INNER_NORMS
            if unknown and name != layer:
                self.cut.replicated.append(f"{name}: {min(unknown)} stands between its linears")
                continue
            self._mlp(name, linears, back, [f"{name}.{n}" for n in between - unknown])

    def _mlp(
        self, name: str, linears: dict[str, nn.Module], back: str, norms: Sequence[str]
    ) -> None:
        width, _ = features(linears[back])
        shares = split_evenly(width, self.size)
        own = shares[self.rank]
        for leaf, linear in linears.items():
            full = f"{name}.{leaf}"
            if leaf == back:
                self._rows(full, _at(own))
            else:
                copies = features(linear)[1] // width
                self._columns(full, tuple(_shift(own, i * width) for i in range(copies)))
        for norm in norms:
            module = self.modules[norm]
            replace_forward(module, GatheredNorm(module, self.context, shares, self.rank))

    def _experts(self, name: str) -> None:
        module = self.modules[name]
        first = "gate_up_proj" if module.has_gate else "up_proj"
        count = getattr(module, first).shape[0]
        if self.size == 1:
            self.cut.experts[name] = (range(count), "none")
        elif self.spec.expert_parallel:
            own = split_evenly(count, self.size)[self.rank]
            for leaf, _ in module.named_parameters(recurse=False):
                self._keep(f"{name}.{leaf}", 0, _at(own))
            self.cut.experts[name] = (own, "whole")
        else:
            split = self._attempt(name, lambda: self._expert_columns(name, module, first))
            self.cut.experts[name] = (range(count), split or "none")

    def _expert_columns(self, name: str, module: nn.Module, first: str) -> ExpertSplit:
        known = {first, "down_proj", f"{first}_bias", "down_proj_bias"}
        unknown = [n for n, _ in module.named_parameters(recurse=False) if n not in known]
        if unknown:
            raise NotUnderstoodError(f"parameter {unknown[0]}")
        in_dim, out_dim = (1, 2) if module.is_transposed else (2, 1)
        width = int(module.get_parameter("down_proj").shape[in_dim])
        own = split_evenly(width, self.size)[self.rank]
        if not module.has_gate:
            ranges = _at(own)
        elif module.is_concatenated:
            ranges = (_shift(own, 0), _shift(own, width))
        else:  # gate and up of one column stand side by side
            ranges = ((2 * own.start, 2 * own.stop),)
        self._keep(f"{name}.{first}", out_dim, ranges)
        if hasattr(module, f"{first}_bias"):
            self._keep(f"{name}.{first}_bias", 1, ranges)
        self._keep(f"{name}.down_proj", in_dim, _at(own))
        return "columns"

    # -- vocabulary ------------------------------------------------------------------------------

    def _vocabulary(self) -> None:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        names = {id(module): name for name, module in self.modules.items()}
        if isinstance(embedding, nn.Embedding) and embedding.num_embeddings >= self.size:
            rows = split_evenly(embedding.num_embeddings, self.size)[self.rank]
            replace_forward(embedding, VocabParallelEmbedding(embedding, self.context, rows))
            self._keep(f"{names[id(embedding)]}.weight", 0, _at(rows))
            embedding.padding_idx = None  # may lie outside the share, and only matters in training
        if isinstance(head, nn.Linear) and head.out_features >= self.size:
            shares = split_evenly(head.out_features, self.size)
            gathered = GatheredLinear(head, self.context, [len(s) for s in shares])
            replace_forward(head, gathered)
            self._columns(names[id(head)], _at(shares[self.rank]))


class _AttentionPlan:
    """How one attention module is cut; raises NotUnderstoodError before anything is changed."""

    def __init__(
        self, modules: dict[str, nn.Module], seen: AttentionSeen, size: int, rank: int
    ) -> None:
        self.seen, self.rank, self.module = seen, rank, modules[seen.name]
        self.latent = seen.cache.kind == "latent"
        self.num_kv_heads = seen.num_heads if self.latent else seen.cache.num_heads
        if size > seen.num_heads:
            raise NotUnderstoodError(f"{seen.num_heads} heads over {size} ranks")
        if seen.num_heads % self.num_kv_heads or (
            not self.latent and seen.num_kv_heads != self.num_kv_heads
        ):
            raise NotUnderstoodError("its KV heads are expanded before they are stored")
        self.shares = split_heads(seen.num_heads, self.num_kv_heads, size)
        self.columns: dict[str, Ranges] = {}
        self.rows: dict[str, Ranges] = {}
        self.parameters: dict[str, Ranges] = {}
        self.norms: dict[str, list[range]] = {}
        for name, module in modules.items():
            if name == seen.name or name.startswith(f"{seen.name}."):
                self._module(name, module)
        if not self.rows or not self.columns:
            raise NotUnderstoodError("no projection in or out was recognised")

    @property
    def own(self) -> HeadShare:
        return self.shares[self.rank]

    def _module(self, name: str, module: nn.Module) -> None:
        leaf = name.rpartition(".")[2]
        own = dict(module.named_parameters(recurse=False))
        if name == self.seen.name:
            for parameter, tensor in own.items():
                self._parameter(name, parameter, tensor)
        elif is_linear(module):
            self._linear(name, leaf, module)
        elif own:
            self._norm(name, leaf, module)

    def _parameter(self, name: str, leaf: str, tensor: torch.Tensor) -> None:
        known = leaf in tables.ATTENTION_HEAD_PARAMETERS
        if not known or tuple(tensor.shape) != (self.seen.num_heads,):
            raise NotUnderstoodError(f"parameter {leaf}")
        self.parameters[f"{name}.{leaf}"] = _at(self.own.query)

    def _linear(self, name: str, leaf: str, module: nn.Module) -> None:
        role = tables.ATTENTION_LINEARS.get(leaf.lower())
        into, out = features(module)
        heads, kv_heads = self.seen.num_heads, self.num_kv_heads
        query_dim, key_dim, value_dim = self._dims()
        own = self.own
        expected = {
            "query": heads * query_dim,
            "key": kv_heads * key_dim,
            "value": kv_heads * value_dim,
            "packed": heads * query_dim + kv_heads * (key_dim + value_dim),
            "per_head": heads * (query_dim + key_dim + value_dim),
            "latent_heads": heads * (out // heads),
        }
        if role == "packed" and getattr(self.module, tables.PACKED_BY_ROLE, True) is False:
            role = "per_head"
        if role == "whole":
            return
        if role == "query" and out == heads:  # a gate with one value a head
            query_dim, expected["query"] = 1, heads
        if role == "out":
            if into != heads * value_dim:
                raise NotUnderstoodError(f"{leaf} takes {into} columns")
            self.rows[name] = _scaled(own.query, value_dim)
            return
        if role is None or out != expected[role] or (role == "per_head" and heads != kv_heads):
            raise NotUnderstoodError(f"{leaf} gives {out} columns")
        ranges: dict[str, Ranges] = {
            "query": _scaled(own.query, query_dim),
            "key": _scaled(own.kv, key_dim),
            "value": _scaled(own.kv, value_dim),
            "per_head": _scaled(own.query, query_dim + key_dim + value_dim),
            "latent_heads": _scaled(own.query, out // heads),
        }
        keys_at = heads * query_dim
        ranges["packed"] = (
            *ranges["query"],
            *_moved(ranges["key"], keys_at),
            *_moved(ranges["value"], keys_at + kv_heads * key_dim),
        )
        self.columns[name] = ranges[role]

    def _dims(self) -> tuple[int, int, int]:
        if self.latent:
            return self.seen.query_dim, 0, self.seen.value_dim
        return self.seen.query_dim, self.seen.cache.key_dim, self.seen.cache.value_dim

    def _norm(self, name: str, leaf: str, module: nn.Module) -> None:
        """A norm inside the attention: over each head (kept) or over all heads (gathered)."""
        role = tables.ATTENTION_NORMS.get(leaf)
        if role == "whole":
            return
        own = dict(module.named_parameters(recurse=False))
        shapes = {tuple(tensor.shape) for tensor in own.values()}
        num_heads, dims = self.seen.num_heads, self._dims()
        sizes = {
            "query": (num_heads, dims[0]),
            "key": (self.num_kv_heads, dims[1]),
            "out": (num_heads, dims[2]),
        }
        heads, dim = sizes.get(role or "", (0, 0))
        parts = [share.kv if role == "key" else share.query for share in self.shares]
        # With a row of weights for each head; torch's own norm would norm over all of them.
        if heads and shapes == {(heads, dim)} and not isinstance(module, nn.LayerNorm):
            self.parameters |= {f"{name}.{leaf}": _at(parts[self.rank]) for leaf in own}
        elif heads and shapes == {(heads * dim,)} != {(dim,)}:
            self.norms[name] = [range(part.start * dim, part.stop * dim) for part in parts]
        elif not heads or shapes != {(dim,)}:
            raise NotUnderstoodError(f"{leaf} {sorted(shapes)}")

    def set_counts(self, module: nn.Module) -> None:
        """Let the module's own counts, and its view of the config, be those of the share."""
        seen, own = self.seen, self.own
        dims = self._dims()
        replaced = [
            (tables.HEAD_COUNTS, seen.num_heads, len(own.query)),
            (tables.KV_HEAD_COUNTS, self.num_kv_heads, len(own.kv)),
            (tables.HEAD_COLUMNS, seen.num_heads * dims[2], len(own.query) * dims[2]),
            (tables.KV_COLUMNS, self.num_kv_heads * dims[1], len(own.kv) * dims[1]),
        ]
        for names, whole, share in replaced:
            for name in names:
                if module.__dict__.get(name) == whole:
                    setattr(module, name, share)
        config = module.__dict__.get("config")
        if config is not None:
            local = copy.copy(config)
            if getattr(local, "num_attention_heads", None) == seen.num_heads:
                local.num_attention_heads = len(own.query)
            if getattr(local, "num_key_value_heads", None) == self.num_kv_heads:
                local.num_key_value_heads = len(own.kv)
            module.config = local

    def share(self) -> LayerShare:
        """The cache and head map of the rank."""
        cache = self.seen.cache
        if self.latent:
            return LayerShare(cache, None)
        own = self.own
        index = kv_index(own, self.seen.num_heads, self.num_kv_heads)
        group = len(own.query) // len(own.kv) if len(own.query) % len(own.kv) == 0 else 0
        even = group > 0 and index == tuple(i // group for i in range(len(own.query)))
        local = LayerCache(cache.kind, len(own.kv), cache.key_dim, cache.value_dim, cache.window)
        return LayerShare(local, None if even else index)


def _back_projection(linears: dict[str, nn.Module]) -> str | None:
    """Among linears of one module, the one that projects back where all others project out."""
    if len(linears) < 2:
        return None
    fits = []
    for leaf, back in linears.items():
        width, hidden = features(back)
        others = [features(m) for n, m in linears.items() if n != leaf]
        if all(into == hidden and out in (width, 2 * width) for into, out in others):
            fits.append(leaf)
    named = [leaf for leaf in fits if leaf in tables.BACK_PROJECTIONS]
    if len(fits) == 1:
        return fits[0]
    return named[0] if len(named) == 1 else None


def _has_vectors(module: nn.Module) -> bool:
    """Whether a module has weights; single numbers, as some activations have, do not count."""
    return any(parameter.numel() > 1 for parameter in module.parameters())


def _at(share: range) -> Ranges:
    return ((share.start, share.stop),)


def _shift(share: range, by: int) -> tuple[int, int]:
    return share.start + by, share.stop + by


def _scaled(share: range, unit: int) -> Ranges:
    return ((share.start * unit, share.stop * unit),)


def _moved(ranges: Sequence[tuple[int, int]], by: int) -> Ranges:
    return tuple((start + by, end + by) for start, end in ranges)
