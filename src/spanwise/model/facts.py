"""What can be said of a model folder before a weight is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from spanwise.model import tables
from spanwise.model.build import build_on_meta, read_model_config, resolve_dtype
from spanwise.model.context import ShardContext
from spanwise.model.probe import Probe, probe
from spanwise.model.rotary import dynamic_limit, long_rope_border
from spanwise.model.shard import cut_on_meta
from spanwise.types.model import ModelFacts
from spanwise.types.worker import ShardSpec


def describe(folder: str, dtype: str) -> ModelFacts:
    """Build the model without memory and count. Raises ModelError for what is not supported."""
    config = read_model_config(folder)
    model = build_on_meta(config, resolve_dtype(config, dtype))
    tables.check_plans(model)
    seen = probe(model)
    text = config.get_text_config()
    layer_bytes, first_bytes, last_bytes = _weigh(model, seen)
    limits = [x for x in (getattr(text, "max_position_embeddings", 0), dynamic_limit(model)) if x]
    border = long_rope_border(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    facts = ModelFacts(
        architecture=type(model).__name__,
        model_type=str(config.model_type),
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=len(seen.attention),
        hidden_size=int(text.hidden_size),
        vocab_size=_rows(embeddings),
        max_position=min(limits, default=0),
        num_attention_heads=seen.attention[0].num_heads,
        num_kv_heads=seen.attention[0].num_kv_heads,
        intermediate_size=_width(getattr(text, "intermediate_size", 0)),
        num_experts=_num_experts(model, seen),
        tied_embeddings=head is not None and head.weight is embeddings.weight,
        layer_bytes=layer_bytes,
        first_bytes=first_bytes,
        last_bytes=last_bytes,
        layer_caches=tuple(s.cache for s in seen.attention),
        recompute_lengths=(border,) if border else (),
        pipeline_refusal=seen.pipeline_refusal,
        replicated=_whole_under_tensor_parallelism(model, seen),
    )
    return facts


def _rows(embeddings: nn.Module) -> int:
    assert isinstance(embeddings.weight, torch.Tensor)
    return embeddings.weight.shape[0]


def _width(configured: int | Sequence[int] | None) -> int:
    """One number, where a config may give one for each layer."""
    return int(max(configured) if isinstance(configured, Sequence) else configured or 0)


def _num_experts(model: PreTrainedModel, seen: Probe) -> int:
    counts = [
        next(model.get_submodule(name).parameters(recurse=False)).shape[0] for name in seen.experts
    ]
    return max(counts, default=0)


def _weigh(model: PreTrainedModel, seen: Probe) -> tuple[tuple[int, ...], int, int]:
    """Bytes of every layer, of what stands before the layers and of what stands after."""
    layers = [0] * len(seen.attention)
    around: dict[str, int] = defaultdict(int)
    for name, tensor in model.state_dict(keep_vars=True).items():
        size = tensor.numel() * tensor.element_size()
        if name.startswith(f"{seen.layers_name}."):
            layers[int(name[len(seen.layers_name) + 1 :].split(".")[0])] += size
        else:
            around[name.rpartition(".")[0]] += size
    first = sum(around[name] for name in seen.before_layers)
    last = sum(around[name] for name in seen.after_layers)
    return tuple(layers), first, last


def _whole_under_tensor_parallelism(model: PreTrainedModel, seen: Probe) -> tuple[str, ...]:
    """Parts that tensor parallelism would not cut. Cuts the model given: call this last."""
    if any(heads < 2 for heads in (s.num_heads for s in seen.attention)):
        return ()
    spec = ShardSpec(
        folder="",
        dtype="",
        first_layer=0,
        end_layer=len(seen.attention),
        num_layers=len(seen.attention),
        tp_size=2,
    )
    assert isinstance(model, nn.Module)
    return tuple(cut_on_meta(model, seen, spec, ShardContext()).replicated)
