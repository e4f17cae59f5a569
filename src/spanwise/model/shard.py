"""One rank's part of a model, loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spanwise.comm.communicator import Communicator
from spanwise.device.linear import packs
from spanwise.device.memory import claiming, giving_back
from spanwise.model import seams, tables
from spanwise.model.attention import LayerAttention
from spanwise.model.batch import StepBatch
from spanwise.model.build import build_on_meta, compute_buffers, read_model_config, resolve_dtype
from spanwise.model.checkpoint import Checkpoint, WantedTensor
from spanwise.model.context import ShardContext
from spanwise.model.cut import Cut, Cutter
from spanwise.model.experts import RoutedExperts
from spanwise.model.paged_cache import LayerStore, PagedCache
from spanwise.model.prepare import prepare, quantized_growth
from spanwise.model.probe import Probe, accepts, probe
from spanwise.model.rotary import make_per_sequence
from spanwise.model.stage import StageOutput, keep_stage
from spanwise.types.cache import LayerCache
from spanwise.types.worker import ShardInfo, ShardSpec

_CPU = torch.device("cpu")


class Shard:
    """A stage's share of one tensor-parallel rank: weights and forward, no cache, no peers yet.

    ``join`` gives it both. ``layer_caches`` is what each owned layer stores on this rank.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ShardSpec,
        seen: Probe,
        context: ShardContext,
        cut: Cut,
        weight_bytes: int,
        device: torch.device,
    ) -> None:
        self.model, self.spec, self.context, self.cut = model, spec, context, cut
        self.dtype, self.weight_bytes = model.dtype, weight_bytes
        self.layer_caches: dict[int, LayerCache] = {i: s.cache for i, s in cut.layers.items()}
        self._attention = {
            layer: LayerAttention(context, layer, share.cache, share.kv_index, device)
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

    def _keep_hidden(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Keep what the head reads, ``[wanted, hidden]``: the answer of pooling requests."""
        hidden = args[0][0]
        self.last_hidden = hidden if self._slices_logits else hidden[self.context.step.wanted]

    def prepare(self, seen: Probe) -> None:
        """Bring the loaded weights into the form that their device computes fastest."""
        self.weight_bytes += prepare(self.model, seen, self._attention, self.spec.quantization)

    def info(self) -> ShardInfo:
        """What the engine needs to know to size the cache; the same before weights are loaded."""
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

    @property
    def is_recordable(self) -> bool:
        """Whether decode steps of one shape are always the same operations, read in place.

        The host picks the tokens of routed experts, and goes through latents row by row. Query
        heads that do not divide evenly need their histories gathered.
        """
        if any(own.kind == "latent" for own in self.layer_caches.values()):
            return False
        is_even = all(handler.kv_index is None for handler in self._attention.values())
        return is_even and not self.cut.experts

    def join(self, tp: Communicator, stores: dict[int, LayerStore]) -> None:
        """Take part in a tensor-parallel group, with a cache."""
        self.context.tp = tp
        self._cache = PagedCache(self.context, stores)
        for layer, handler in self._attention.items():
            handler.store = stores[layer]

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


def describe_shard(spec: ShardSpec) -> ShardInfo:
    """What ``load_shard`` would hold, reading headers only. Raises ModelError."""
    draft = _Draft(spec)
    draft.weight_bytes += quantized_growth(draft.model, draft.seen, spec.quantization)
    return draft.shard(torch.device("meta")).info()


def load_shard(spec: ShardSpec, device: torch.device = _CPU) -> Shard:
    """Build, cut and load one rank's part, reading only its slices. Raises ModelError.

    To a card tensor by tensor: the host holds one at a time. Raises DeviceError where it is full.
    """
    draft = _Draft(spec)
    with giving_back(device), claiming(device, draft.weight_bytes, "its share of the weights"):
        draft.load(device)
        shard = draft.shard(device)
        if device.type != "meta":
            shard.prepare(draft.seen)
        draft.settle()
        return shard


@dataclass(frozen=True)
class _Piece:
    """A tensor to load once, and the names under which the model has it (several if tied)."""

    source: str
    wanted: WantedTensor
    names: list[str]
    num_bytes: int


class _Draft:
    """A rank's part of a model, checked against its checkpoint and cut, still without weights."""

    def __init__(self, spec: ShardSpec) -> None:
        config = read_model_config(spec.folder)
        self.spec, self.context = spec, ShardContext()
        self.model = build_on_meta(config, resolve_dtype(config, spec.dtype))
        tables.check_plans(self.model)
        self.checkpoint = Checkpoint.open(Path(spec.folder), self.model)
        self.checkpoint.validate()
        self.seen = probe(self.model)
        shapes = {name: tuple(t.shape) for name, t in _stored(self.model).items()}
        compute_buffers(self.model)
        self.cut = cut_on_meta(self.model, self.seen, spec, self.context)
        self.pieces = _pieces(self.model, self.cut, shapes)
        computed = sum(buffer.nbytes for buffer in self.model.buffers() if not buffer.is_meta)
        self.weight_bytes = sum(piece.num_bytes for piece in self.pieces) + computed
        self._mapped: list[_Piece] = []

    def load(self, device: torch.device) -> None:
        """Fill the model, on a device; until ``settle`` with what lies in the files, in part."""
        for piece in self.pieces:
            value = self.checkpoint.view(piece.source, piece.wanted)
            if value is not None and device.type == "cpu" and value.dim() == 2 and packs(value):
                self._mapped.append(piece)  # packing reads it: a copy would only be let go again
            elif value is None or device.type == "cpu":
                value = self.checkpoint.load(piece.source, piece.wanted)
            _place(self.model, piece.names, value.to(device))
        move_computed(self.model, device)

    def settle(self) -> None:
        """Copy what still lies in the files: it was not packed."""
        for piece in self._mapped:
            names = [name for name in piece.names if not _tensor_of(self.model, name).is_meta]
            if names:
                _place(self.model, names, _tensor_of(self.model, names[0]).detach().clone())
        self._mapped.clear()

    def shard(self, device: torch.device) -> Shard:
        """The shard; nothing may be changed here afterwards."""
        return Shard(
            self.model, self.spec, self.seen, self.context, self.cut, self.weight_bytes, device
        )


def _stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.state_dict(keep_vars=True))


def _pieces(
    model: PreTrainedModel, cut: Cut, full_shapes: dict[str, tuple[int, ...]]
) -> list[_Piece]:
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    pieces: dict[tuple[str, object], _Piece] = {}
    for name, tensor in _stored(model).items():
        source, cuts = tied.get(name, name), cut.tensors.get(name, ())
        wanted = WantedTensor(full_shapes[name], tensor.dtype, cuts)
        piece = pieces.setdefault((source, cuts), _Piece(source, wanted, [], tensor.nbytes))
        piece.names.append(name)
    return list(pieces.values())


def _tensor_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return found


def _place(model: PreTrainedModel, names: list[str], value: torch.Tensor) -> None:
    parameter = nn.Parameter(value, requires_grad=False)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        template = getattr(module, leaf)
        assert value.shape == template.shape, (name, value.shape, template.shape)
        if isinstance(template, nn.Parameter):
            setattr(module, leaf, parameter)
        else:
            module._buffers[leaf] = value


def move_computed(model: PreTrainedModel, device: torch.device) -> None:
    """Move what was computed and not loaded: buffers, and tensors that parts keep for themselves.

    A part here is a module or what stands for its forward.
    """
    if device.type == "cpu":
        return
    for module in model.modules():
        for kept in (module._buffers, module.__dict__, _own_values(module.__dict__.get("forward"))):
            for name, value in kept.items():
                if isinstance(value, torch.Tensor):
                    kept[name] = value.to(device)


def _own_values(part: object) -> dict[str, Any]:
    return getattr(part, "__dict__", {})
