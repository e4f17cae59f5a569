"""One rank's part of a model, loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from spanwise.comm.communicator import Communicator
from spanwise.model import seams, tables
from spanwise.model.attention import LayerAttention
from spanwise.model.batch import StepBatch
from spanwise.model.build import build_on_meta, compute_buffers, read_model_config, resolve_dtype
from spanwise.model.checkpoint import Checkpoint, WantedTensor
from spanwise.model.context import ShardContext
from spanwise.model.cut import Cut, Cutter
from spanwise.model.experts import RoutedExperts
from spanwise.model.paged_cache import LayerStore, PagedCache
from spanwise.model.probe import Probe, accepts, probe
from spanwise.model.rotary import make_per_sequence
from spanwise.model.stage import StageOutput, keep_stage
from spanwise.types.cache import LayerCache
from spanwise.types.worker import ShardInfo, ShardSpec


class Shard:
    """A stage's share of one tensor-parallel rank: weights and forward, no cache, no peers yet.

    ``join`` gives it both. ``layer_caches`` is what each owned layer stores on this rank.
    """

    def __init__(
        self, model: PreTrainedModel, spec: ShardSpec, seen: Probe, context: ShardContext, cut: Cut
    ) -> None:
        self.model, self.spec, self.context, self.cut = model, spec, context, cut
        self.dtype = model.dtype
        self.layer_caches: dict[int, LayerCache] = {i: s.cache for i, s in cut.layers.items()}
        self._attention = {
            layer: LayerAttention(context, layer, share.cache, share.kv_index)
            for layer, share in cut.layers.items()
        }
        for layer, handler in self._attention.items():
            seams.set_handler(model.get_submodule(seen.attention[layer].name), handler)
        for name, (owned, split) in cut.experts.items():
            seams.set_handler(model.get_submodule(name), RoutedExperts(context, owned, split))
        self.last_hidden = torch.empty(0)
        head = model.get_output_embeddings()
        if spec.is_last and head is not None:
            head.register_forward_pre_hook(self._keep_hidden)
        self._cache: PagedCache | None = None
        self._slices_logits = accepts(model, "logits_to_keep")

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights held, a tensor shared by two modules counted once."""
        tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values() if not t.is_meta)

    def _keep_hidden(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Keep what the head reads, ``[wanted, hidden]``: the answer of pooling requests."""
        hidden = args[0][0]
        self.last_hidden = hidden if self._slices_logits else hidden[self.context.step.wanted]

    def info(self) -> ShardInfo:
        """What the engine needs to know to size the cache."""
        return ShardInfo(
            weight_bytes=self.weight_bytes,
            value_bytes=self.dtype.itemsize,
            hidden_size=self.hidden_size,
            layer_caches=self.layer_caches,
            replicated=tuple(self.cut.replicated),
        )

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states handed between stages."""
        return int(self.model.config.get_text_config().hidden_size)

    def join(self, tp: Communicator, stores: dict[int, LayerStore]) -> None:
        """Take part in a tensor-parallel group, with a cache."""
        self.context.tp = tp
        self._cache = PagedCache(self.context, stores)
        for handler in self._attention.values():
            handler.cache = self._cache

    @torch.inference_mode()
    def forward(self, batch: StepBatch, inbound: torch.Tensor | None) -> torch.Tensor:
        """Run the stage.

        ``inbound`` ``[tokens, hidden]`` comes from the stage before (None on the first). Returns
        hidden states ``[tokens, hidden]``, on the last stage logits ``[wanted, vocab]``.
        """
        self.context.batch = batch
        self.context.inbound = None if inbound is None else inbound[None]
        options = {"logits_to_keep": batch.wanted} if self._slices_logits else {}
        try:
            logits: torch.Tensor = self.model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                **options,
            ).logits[0]
        except StageOutput as stage:
            return stage.hidden[0]
        return logits if self._slices_logits else logits[batch.wanted]


def cut_on_meta(model: PreTrainedModel, seen: Probe, spec: ShardSpec, context: ShardContext) -> Cut:
    """Leave of a built model what one rank owns, still without memory."""
    keep_stage(model, seen, spec, context)
    make_per_sequence(model, context)
    return Cutter(model, seen, spec, context).run()


def load_shard(spec: ShardSpec) -> Shard:
    """Build, cut and load one rank's part, reading only its slices. Raises ModelError."""
    config = read_model_config(spec.folder)
    model = build_on_meta(config, resolve_dtype(config, spec.dtype))
    tables.check_plans(model)
    checkpoint = Checkpoint.open(Path(spec.folder), model)
    checkpoint.validate()
    seen = probe(model)
    full_shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    context = ShardContext()
    compute_buffers(model)
    cut = cut_on_meta(model, seen, spec, context)
    _load_tensors(model, checkpoint, cut, full_shapes, tied)
    return Shard(model, spec, seen, context, cut)


def _load_tensors(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    cut: Cut,
    full_shapes: dict[str, tuple[int, ...]],
    tied: dict[str, str],
) -> None:
    loaded: dict[tuple[str, object], torch.Tensor] = {}
    for name, tensor in list(model.state_dict(keep_vars=True).items()):
        source = tied.get(name, name)
        cuts = cut.tensors.get(name, ())
        key = (source, cuts)
        if key not in loaded:
            wanted = WantedTensor(full_shapes[name], tensor.dtype, cuts)
            loaded[key] = checkpoint.load(source, wanted)
        _place(model, name, loaded[key], tensor)


def _place(model: PreTrainedModel, name: str, value: torch.Tensor, template: torch.Tensor) -> None:
    assert value.shape == template.shape, (name, value.shape, template.shape)
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(template, nn.Parameter):
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    else:
        module._buffers[leaf] = value
