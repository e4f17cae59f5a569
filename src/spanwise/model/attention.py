"""A layer's side of the attention seam: from flattened tokens to one sequence after another."""

from __future__ import annotations

from typing import Any

import torch

from spanwise.device import native
from spanwise.device.attention import AttentionRule, attend_chunk, attend_decodes
from spanwise.device.paged_attention import paged_decode, reads_in_place
from spanwise.device.rotary import Angles, place
from spanwise.model.batch import CacheReads, DecodeRead
from spanwise.model.context import ShardContext
from spanwise.model.paged_cache import LayerStore
from spanwise.types.cache import LayerCache


class LayerAttention:
    """Attends over the paged cache for one layer of a shard.

    ``kv_index`` names the local KV head of each local query head, None where they divide evenly.
    """

    def __init__(
        self,
        context: ShardContext,
        layer: int,
        spec: LayerCache,
        kv_index: tuple[int, ...] | None,
        device: torch.device,
    ) -> None:
        self.context, self.layer, self.spec = context, layer, spec
        self.kv_index = None if kv_index is None else torch.tensor(kv_index, device=device)
        self.store: LayerStore | None = None
        self._rules: dict[tuple[int, float | None, float | None], AttentionRule] = {}

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
        """``query`` ``[1, heads, tokens, dim]`` to ``[1, tokens, heads, value_dim]``."""
        queries = query[0].transpose(0, 1)
        if self.spec.kind != "latent":
            return self.attend_tokens(queries, scaling, softcap, s_aux)[None]
        rule = self._rule(queries, scaling, softcap)
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        return self._expanded(queries, keys, values, rule, s_aux)[None]

    def place(self, heads: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """Turn the step's queries and keys, store its keys and values; the queries.

        ``heads`` ``[tokens, query + 2 * kv heads, dim]``.
        """
        assert self.store is not None
        step = self.context.step
        slots = step.write_slots[step.group_of[self.layer]]
        return place(heads, angles, slots, self.store.keys, self.store.values)

    def attend_tokens(
        self,
        query: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """``query`` ``[tokens, heads, dim]`` to ``[tokens, heads, value_dim]``, over the cache."""
        assert self.store is not None
        rule, store = self._rule(query, scaling, softcap), self.store
        reads = self._reads()
        tokens, heads, dim = query.shape
        # The query heads of a KV head together; each alone where they do not divide evenly.
        kv_heads = store.keys.shape[1] if self.kv_index is None else heads
        queries = query.reshape(tokens, kv_heads, heads // kv_heads, dim)
        if len(reads.decodes) == 1 and reads.decodes[0].tokens is None:  # all rows of the step
            return _attend_decodes(queries, store, reads.decodes[0], rule, sinks).flatten(1, 2)
        out = queries.new_empty((*queries.shape[:3], store.values.shape[2]))
        for chunk in reads.chunks:
            keys, values = store.read(chunk.slots)
            own = slice(chunk.offset, chunk.offset + chunk.count)
            out[own] = attend_chunk(
                queries[own], keys, values, chunk.start, chunk.first_key, rule, sinks
            )
        for decode in reads.decodes:
            assert decode.tokens is not None
            given = queries.index_select(0, decode.tokens)
            out.index_copy_(0, decode.tokens, _attend_decodes(given, store, decode, rule, sinks))
        return out.flatten(1, 2)

    def _expanded(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: AttentionRule,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As ``attend_tokens``, over histories ``[slots, heads, dim]`` that the layer expanded."""
        parts, at = [], 0
        for chunk in self._reads().chunks:
            end = at + chunk.slots.shape[0]
            queries = query[chunk.offset : chunk.offset + chunk.count]
            queries = queries.reshape(chunk.count, keys.shape[1], -1, query.shape[-1])
            own = keys[at:end], values[at:end]
            parts.append(attend_chunk(queries, *own, chunk.start, chunk.first_key, rule, sinks))
            at = end
        return torch.cat(parts).flatten(1, 2)

    def _rule(
        self, query: torch.Tensor, scaling: float | None, softcap: float | None
    ) -> AttentionRule:
        given = (query.shape[-1], scaling, softcap)
        if given not in self._rules:
            self._rules[given] = AttentionRule(
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                window=self.spec.window,
                softcap=softcap or 0.0,
                kv_index=self.kv_index,
            )
        return self._rules[given]

    def _reads(self) -> CacheReads:
        step = self.context.step
        return step.reads[step.group_of[self.layer]]


def _attend_decodes(
    query: torch.Tensor,
    store: LayerStore,
    decode: DecodeRead,
    rule: AttentionRule,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``query`` ``[rows, kv_heads, group, dim]`` over the rows' histories."""
    slots = decode.slots.view(decode.num_rows, -1)
    if native.attends(query, store.keys, store.values, rule, sinks):
        return native.attend_decodes(
            query, store.keys, store.values, slots, decode.counts, rule, sinks
        )
    if reads_in_place(query, store.keys, store.values, rule, sinks):
        counts = decode.counts
        return paged_decode(query, store.keys, store.values, slots, counts, rule, sinks)
    read = store.read(decode.slots)
    keys, values = (part.view(*slots.shape, *part.shape[1:]) for part in read)
    return attend_decodes(query, keys, values, decode.mask(query.dtype), rule, sinks)
