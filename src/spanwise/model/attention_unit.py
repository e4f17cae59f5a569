"""Attentions of any module: found by names in use, with heads counted by the module's attributes.

No class of a model is named: an attention has linears called query, key and value or one called
qkv, and one that brings the heads back, in it or beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from spanwise.layout.heads import HeadShare, split_heads
from spanwise.model import tables
from spanwise.model.parallel import features, is_linear
from spanwise.model.share import (
    Ranges,
    Setting,
    Share,
    TensorSlice,
    column_share,
    joined,
    row_share,
)
from spanwise.model.unit import Unit, children, moved, only_linear, scaled

Role = Literal["query", "key", "value", "packed", "out"]

# Linears of an attention module by the name of the leaf, in small letters. "packed": queries, keys
# and values out of one linear.
_NAMES: dict[Role, str] = {
    "query": "query q_proj q q_lin query_proj to_q wq linear_q",
    "key": "key k_proj k k_lin key_proj to_k wk linear_k",
    "value": "value v_proj v v_lin value_proj to_v wv linear_v",
    "packed": "qkv qkv_proj in_proj query_key_value wqkv to_qkv",
    "out": "out_proj o_proj o out_lin dense wo proj projection to_out linear_out output",
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
_HEAD_COUNTS = (*tables.HEAD_COUNTS, "heads", "nhead", "num_head")
_HEAD_COLUMNS = (*tables.HEAD_COLUMNS, "attn_dim", "attention_dim", "all_head_dim", "dim")
_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size")
_GROUPS = ("num_key_value_groups",)


@dataclass(frozen=True)
class Heads:
    """The heads of an attention module, and how wide one is."""

    query: int
    kv: int
    query_dim: int
    key_dim: int
    value_dim: int

    @property
    def packed_width(self) -> int:
        """Columns of queries, keys and values together."""
        return self.query * self.query_dim + self.kv * (self.key_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class AttentionUnit(Unit):
    """Attention over some of its heads. ``by_head``: packed as one head's three after another's."""

    module: nn.Module
    heads: Heads
    roles: tuple[Role, ...]
    by_head: bool = False

    @property
    def most(self) -> int:
        """One head each."""
        return self.heads.query

    def shares(self, size: int) -> tuple[Share, ...]:
        """Whole heads, not always as many on each rank."""
        heads = self.heads
        if size > heads.query:
            return ()
        return tuple(map(self._share, split_heads(heads.query, heads.kv, size)))

    def _share(self, own: HeadShare) -> Share:
        linears = zip(self.columns, self.roles, strict=True)
        by_head = tuple(_head_slices(self.module, self.heads, own))
        return joined(
            (
                *(column_share(linear, self._columns(role, own)) for linear, role in linears),
                row_share(self.row, scaled(own.query, self.heads.value_dim)),
                Share(by_head, tuple(_counts(self.module, self.heads, own)), ()),
            )
        )

    def _columns(self, role: Role, own: HeadShare) -> Ranges:
        heads = self.heads
        query = scaled(own.query, heads.query_dim)
        key, value = scaled(own.kv, heads.key_dim), scaled(own.kv, heads.value_dim)
        if role == "query":
            return query
        if role != "packed":
            return key if role == "key" else value
        if self.by_head:
            return scaled(own.query, heads.query_dim + heads.key_dim + heads.value_dim)
        keys_at = heads.query * heads.query_dim
        values_at = keys_at + heads.kv * heads.key_dim
        return (*query, *moved(key, keys_at), *moved(value, values_at))


def find_attentions(named: Mapping[str, nn.Module], taken: set[int]) -> Iterator[AttentionUnit]:
    """All attentions; ``taken`` learns their linears, and those that look like an attention's."""
    for name, module in named.items():
        own = _roles(module)
        if not {"query", "key", "value"} <= own.keys() and "packed" not in own:
            continue
        unit = _attention(name, module, own, _out_places(name, module, named))
        if unit is not None and taken.isdisjoint(map(id, (*unit.columns, unit.row))):
            taken.add(id(unit.row))
            yield unit
        taken |= {id(child) for child in module.children() if is_linear(child)}


def _roles(module: nn.Module) -> dict[Role, nn.Module]:
    """The linears of a module whose names say what they are for, the first of each."""
    found: dict[Role, nn.Module] = {}
    for leaf, child in module.named_children():
        role = _ROLES.get(leaf.lower())
        if role is not None and is_linear(child):
            found.setdefault(role, child)
    return found


def _out_places(name: str, module: nn.Module, named: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Linears that may bring the heads of an attention back: in it, in a child, beside it."""
    parent = named[name.rpartition(".")[0]] if name else nn.Module()
    beside = [(leaf, child) for leaf, child in parent.named_children() if child is not module]
    places = [
        linear
        for leaf, child in (*module.named_children(), *beside)
        if _ROLES.get(leaf.lower()) == "out" and (linear := only_linear(child)) is not None
    ]
    return places


def _attention(
    name: str, module: nn.Module, own: Mapping[Role, nn.Module], outs: Sequence[nn.Module]
) -> AttentionUnit | None:
    roles: tuple[Role, ...] = ("packed",) if "packed" in own else ("query", "key", "value")
    columns = tuple(own[role] for role in roles)
    widths = [features(linear)[1] for linear in columns]
    for row in outs:
        heads = _heads(module, widths, features(row)[0])
        if heads is not None:
            shapes = tuple(features(linear) for linear in (*columns, row))
            kind = (type(module), shapes, heads, *children(module))
            unit = AttentionUnit(
                name=name,
                kind=kind,
                columns=columns,
                row=row,
                module=module,
                heads=heads,
                roles=roles,
            )
            return _first_meaning(unit)
    return None


def _first_meaning(unit: AttentionUnit) -> AttentionUnit:
    """The unit, with what else it may mean: more linears by heads, a packed one by head."""
    heads = unit.heads
    more = tuple(
        child
        for child in unit.module.children()
        if is_linear(child)
        and child not in (*unit.columns, unit.row)
        and features(child)[1] == heads.query * heads.query_dim
    )
    roles: tuple[Role, ...] = tuple("query" for _ in more)
    with_more = replace(unit, columns=(*unit.columns, *more), roles=(*unit.roles, *roles))
    meanings = [with_more, unit] if more else [unit]
    if "packed" in unit.roles and heads.query == heads.kv:
        meanings += [replace(meaning, by_head=True) for meaning in meanings]
    otherwise: AttentionUnit | None = None
    for meaning in reversed(meanings):
        otherwise = replace(meaning, otherwise=otherwise)
    assert otherwise is not None
    return otherwise


def _heads(module: nn.Module, widths: Sequence[int], entering: int) -> Heads | None:
    """The heads that a module counts, where its linears are as wide as that many."""
    head_dim, groups = _count(module, _HEAD_DIMS), _count(module, _GROUPS)
    query = _count(module, _HEAD_COUNTS) or (entering // head_dim if head_dim else 0)
    kv = _count(module, tables.KV_HEAD_COUNTS) or query // (groups or 1)
    if not query or not kv or query % kv or entering % query:
        return None
    value_dim = entering // query
    if len(widths) == 1:
        heads = Heads(query, kv, value_dim, value_dim, value_dim)
        return heads if heads.packed_width == widths[0] else None
    columns, key_columns, value_columns = widths
    heads = Heads(query, kv, columns // query, key_columns // kv, value_dim)
    expected = (query * heads.query_dim, kv * heads.key_dim, kv * value_dim)
    return heads if expected == (columns, key_columns, value_columns) else None


def _count(module: nn.Module, names: Sequence[str]) -> int:
    """What the module says under the first of the names that it has; 0 where it has none."""
    own = module.__dict__
    return next((own[name] for name in names if isinstance(own.get(name), int)), 0)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """An attention module, and all in it that is no linear."""
    return (part for part in module.modules() if not is_linear(part))


def _head_slices(module: nn.Module, heads: Heads, own: HeadShare) -> Iterator[TensorSlice]:
    """Tensors with an entry for each head, as position biases and sinks have.

    A vector in a part of the module is taken for a norm's, over each head.
    """
    ranges = scaled(own.query, 1)
    for part in _parts(module):
        tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        for name, tensor in tensors:
            dims = [dim for dim, count in enumerate(tensor.shape) if count == heads.query]
            if isinstance(part, nn.Embedding):
                dims = [dim for dim in dims if dim == 1]
            if len(dims) == 1 and (part is module or tensor.dim() > 1):
                yield TensorSlice(part, name, dims[0], ranges)


def _counts(module: nn.Module, heads: Heads, own: HeadShare) -> Iterator[Setting]:
    """The module's own counts of heads and their columns, as they are on a rank."""
    replaced = (
        (_HEAD_COUNTS, heads.query, len(own.query)),
        (tables.KV_HEAD_COUNTS, heads.kv, len(own.kv)),
        (_HEAD_COLUMNS, heads.query * heads.value_dim, len(own.query) * heads.value_dim),
        (_GROUPS, heads.query // heads.kv, len(own.query) // len(own.kv)),
    )
    for part in _parts(module):
        for names, whole, share in replaced:
            for name in names:
                if part.__dict__.get(name) == whole:
                    yield Setting(part, name, share)
    config: Any = module.__dict__.get("config")
    if config is not None:
        yield Setting(module, "config", _local(config, heads, own))


def _local(config: Any, heads: Heads, own: HeadShare) -> Any:
    """The config as the module sees it: some read their counts there."""
    local = copy.copy(config)
    if getattr(local, "num_attention_heads", None) == heads.query:
        local.num_attention_heads = len(own.query)
    if getattr(local, "num_key_value_heads", None) == heads.kv:
        local.num_key_value_heads = len(own.kv)
    return local
