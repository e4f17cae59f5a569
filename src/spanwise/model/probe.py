"""Learning what a model does by running it once on the meta device, where nothing is computed.

What each layer caches, sees and passes on is observed at the seams instead of guessed from names:
heads and dimensions, windows (from the mask transformers itself would build), soft caps, sinks,
latents, the order of modules, and whether anything but hidden states passes between layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from spanwise.errors import ModelError, reason
from spanwise.model import seams, tables
from spanwise.model.build import set_attention
from spanwise.model.rotary import fixed_tables
from spanwise.types.cache import CacheKind, LayerCache

# A number no model has as a width, so that shapes tell where the tokens are.
NUM_TOKENS = 11
# Tensors a layer may receive beside its hidden states: they follow from positions alone.
_POSITIONAL = {"position_embeddings", "position_ids", "cache_position"}
# Tensors the attention function may be given; the mask is ours, positions are known anyway.
_KNOWN_OPTIONS = {"attention_mask", "s_aux", *_POSITIONAL}


@dataclass
class AttentionSeen:
    """One attention call: the module and the shapes that passed the seams (whole model)."""

    module: nn.Module
    name: str
    num_heads: int
    num_kv_heads: int
    query_dim: int
    value_dim: int
    cache: LayerCache


@dataclass
class Probe:
    """What a run on the meta device showed."""

    layers_name: str = ""
    attention: list[AttentionSeen] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    before_layers: list[str] = field(default_factory=list)
    after_layers: list[str] = field(default_factory=list)
    output_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    returns_tuple: bool = False
    pipeline_refusal: str = ""


def run_on_meta(
    model: PreTrainedModel, cache: seams.CacheShape, positions: torch.Tensor
) -> torch.Tensor:
    """One forward of NUM_TOKENS tokens on the meta device; the logits ``[1, n, vocab]``."""
    output = model(
        input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.long, device="meta"),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )
    logits: torch.Tensor = output.logits
    return logits


class _Recorder(seams.CacheShape):
    """The cache and the handlers of a probe run: records what passes."""

    def __init__(self, names: dict[int, str], calls: _CallOrder) -> None:
        super().__init__()
        self.names, self.calls = names, calls
        self.length_asked_in: set[str] = set()
        self.updates: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.current: int | None = None
        self.attention: list[AttentionSeen] = []
        self.experts: list[str] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Note which module wants to count positions itself."""
        self.length_asked_in.add(self.calls.inputs[-1][0] if self.calls.inputs else "")
        return 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note what a layer stores."""
        if layer_idx in self.updates:
            raise ModelError(f"layer {layer_idx} stores keys and values twice a step")
        self.updates[layer_idx] = (key_states, value_states)
        self.current = layer_idx
        return key_states, value_states

    def see_attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        if self.current is None:
            raise ModelError(
                f"{type(module).__name__} attends without storing keys and values (a cache shared "
                "between layers, or two attentions over one); not supported yet"
            )
        stored_key, stored_value = self.updates[self.current]
        _check_options(module, options)
        kept = key is stored_key and value is stored_value
        window = _window(module, options)
        kind: CacheKind = "latent" if not kept else "window" if window else "full"
        cache = LayerCache(
            kind=kind,
            num_heads=stored_key.shape[1],
            key_dim=stored_key.shape[-1],
            value_dim=stored_value.shape[-1],
            window=window,
        )
        if self.current != len(self.attention):
            raise ModelError(
                f"{type(module).__name__} is not every layer's attention: others keep another kind "
                "of state, or none; not supported yet"
            )
        self.attention.append(
            AttentionSeen(
                module,
                self.names[id(module)],
                query.shape[1],
                key.shape[1],
                query.shape[-1],
                value.shape[-1],
                cache,
            )
        )
        self.current = None
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


class _ProbeHandler:
    """Answers a module's seams during a probe."""

    def __init__(self, module: nn.Module, recorder: _Recorder) -> None:
        self.module, self.recorder = module, recorder

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        return self.recorder.see_attention(self.module, query, key, value, options)

    def mix(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        self.recorder.experts.append(self.recorder.names[id(module)])
        return torch.empty_like(hidden)


def _check_options(module: nn.Module, options: dict[str, Any]) -> None:
    unknown = [
        name
        for name, value in options.items()
        if isinstance(value, torch.Tensor) and name not in _KNOWN_OPTIONS
    ]
    if unknown:
        raise ModelError(
            f"{type(module).__name__} gives its attention a tensor {unknown[0]!r}, which is not "
            "supported yet"
        )


def _window(module: nn.Module, options: dict[str, Any]) -> int:
    """How many positions a query sees (0: all), from the mask transformers would have applied."""
    mask = options.get("attention_mask")
    passed = options.get("sliding_window") or 0
    if not isinstance(mask, seams.SeenMask):
        return int(passed)
    mask_function = getattr(mask, "mask_function", None)
    if mask_function is None:  # what torch makes of a mask does not carry it on
        raise _other_mask(module, "it is changed after transformers made it")

    def sees(query: int, key: int) -> bool:
        at = [torch.tensor(x) for x in (0, 0, query, key)]
        try:
            return bool(mask_function(*at))
        except (RuntimeError, IndexError) as error:  # it looks up what depends on the sequence
            raise _other_mask(module, f"its function says: {reason(error)}") from error

    seen = {_reach(sees, query) for query in (2**22, 2**22 + 1, 2**22 + 3)}
    reach = seen.pop()
    if seen or reach is None:
        raise _other_mask(module, "chunked or bidirectional attention")
    return reach


def _other_mask(module: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"{type(module).__name__} uses a mask that is neither causal nor a sliding window "
        f"({why}); not supported yet"
    )


def _reach(sees: Callable[[int, int], bool], query: int) -> int | None:
    """Positions seen at ``query``: 0 for all before it, None if it also sees the future."""
    if sees(query, query + 1) or not sees(query, query):
        return None
    if sees(query, 0):
        return 0
    low, high = 0, query
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sees(query, middle) else (middle, high)
    return query - high + 1


def probe(model: PreTrainedModel) -> Probe:
    """Run the model once and say what it does. Raises ModelError for what is not supported.

    Parts of the model that a text does not run through (image and audio towers) are taken out.
    """
    names = {id(module): name for name, module in model.named_modules()}
    calls = _CallOrder(model, names)
    recorder = _Recorder(names, calls)
    reached: list[bool] = []
    positions = torch.zeros(1, NUM_TOKENS, dtype=torch.long, device="meta")
    for module in model.modules():
        seams.set_handler(module, _ProbeHandler(module, recorder))
    set_attention(model, seams.PROBE_ATTENTION)
    try:
        with torch.no_grad(), fixed_tables(model):
            run_on_meta(model, recorder, seams.seen_positions(positions, reached))
    except (
        RuntimeError,
        TypeError,
        AttributeError,
        NotImplementedError,
        ValueError,
        KeyError,
        IndexError,
    ) as error:
        raise ModelError(
            f"{type(model).__name__} cannot run through the attention interface and a paged cache: "
            f"{_in_words(error)}; this architecture is not supported"
        ) from error
    finally:
        calls.remove()
        set_attention(model, seams.ATTENTION)
        for module in model.modules():
            module.__dict__.pop(seams._HANDLER, None)
    result = Probe(attention=recorder.attention, experts=recorder.experts)
    _find_layers(model, result)
    _check_positions(model, result, recorder, bool(reached))
    _check_windows(model, result)
    calls.order(result)
    _drop_unused(model, result, calls)
    return result


def _in_words(error: Exception) -> str:
    """Why a run failed, in words where the error's own say nothing to a user."""
    said = reason(error)
    return next((words for sign, words in tables.FAILURES.items() if sign in said), said)


def _check_positions(
    model: PreTrainedModel, result: Probe, recorder: _Recorder, reached: bool
) -> None:
    """Refuse a model that counts positions from the cache's length: a step has many sequences."""
    asked = recorder.length_asked_in
    in_layer = any(name.startswith(f"{result.layers_name}.") for name in asked)
    if in_layer or (asked and not reached):
        raise ModelError(
            f"{type(model).__name__} counts positions by itself instead of taking position_ids "
            "(decoders of encoder-decoder models do); not supported yet"
        )


def _check_windows(model: PreTrainedModel, result: Probe) -> None:
    """Refuse a model whose own cache forgets what its mask still lets it see."""
    own = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    for seen, layer in zip(result.attention, own, strict=False):
        if getattr(layer, "is_sliding", False) and not seen.cache.window:
            raise ModelError(
                f"{type(model).__name__} has a sliding_window in its cache that its attention mask "
                "does not have; not supported yet"
            )


def _drop_unused(model: PreTrainedModel, result: Probe, calls: _CallOrder) -> None:
    """Take out the towers beside the decoder that a text did not run through."""
    ran = {name for name, *_ in calls.calls}
    used = {".".join(n.split(".")[:i]) for n in ran for i in range(1, n.count(".") + 2)}
    for owner_name in {"", *(n for n in used if result.layers_name.startswith(f"{n}."))}:
        owner = model.get_submodule(owner_name)
        for leaf, child in list(owner.named_children()):
            name = f"{owner_name}.{leaf}".lstrip(".")
            if name not in used and any(True for _ in child.children()):
                setattr(owner, leaf, None)


def _find_layers(model: PreTrainedModel, result: Probe) -> None:
    """The ModuleList of decoder layers: the one whose every item holds one attention call."""
    wanted = len(result.attention)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        inside = [s for s in result.attention if s.name.startswith(f"{name}.")]
        if inside and len(module) == wanted == len(inside):
            result.layers_name = name
            return
        if inside:
            without = sorted(
                set(range(len(module)))
                - {int(s.name[len(name) + 1 :].split(".")[0]) for s in inside}
            )
            what = (
                f"layers {without[:8]} of {len(module)} keep no attention cache (recurrent or "
                "convolution state, or a cache shared between layers)"
                if without
                else "its layers attend more than once a step"
            )
            raise ModelError(f"{type(model).__name__}: {what}; not supported yet")
    raise ModelError(
        f"{type(model).__name__} does not use the attention interface; not supported yet"
    )


class _CallOrder:
    """Which modules run before, in and after the layers, and what passes between layers."""

    def __init__(self, model: PreTrainedModel, names: dict[int, str]) -> None:
        self.names = names
        self.calls: list[tuple[str, nn.Module, Any]] = []
        self.inputs: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.outputs: dict[str, Any] = {}
        self.handles = []
        for module in model.modules():
            self.handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append((self.names[id(module)], args, kwargs))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self.names[id(module)]
        self.outputs[name] = output
        self.calls.append((name, module, output))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def order(self, result: Probe) -> None:
        """Fill in what surrounds the layers and whether they can be cut apart."""
        prefix = f"{result.layers_name}."
        inside = [i for i, (name, *_) in enumerate(self.calls) if name.startswith(prefix)]
        for i, (name, module, output) in enumerate(self.calls):
            # A module around others keeps its own few parameters on every stage.
            own = any(True for _ in module.parameters(recurse=False))
            if name.startswith(prefix) or not own or any(_weighty(c) for c in module.children()):
                continue
            where = result.before_layers if i < inside[0] else result.after_layers
            where.append(name)
            if isinstance(output, torch.Tensor):
                result.output_shapes[name] = tuple(output.shape)
            else:
                result.pipeline_refusal = f"{name} gives more than one tensor"
        self._check_layers(result)

    def _check_layers(self, result: Probe) -> None:
        count = len(result.attention)
        names = [f"{result.layers_name}.{i}" for i in range(count)]
        inputs = {name: (args, kwargs) for name, args, kwargs in self.inputs}
        result.returns_tuple = not isinstance(self.outputs[names[0]], torch.Tensor)
        previous: torch.Tensor | None = None
        for name in names:
            args, kwargs = inputs[name]
            hidden = hidden_of(args, kwargs)
            if previous is not None and hidden is not previous:
                result.pipeline_refusal = "more than hidden states passes between its layers"
            output = self.outputs[name]
            previous = output if isinstance(output, torch.Tensor) else output[0]
            if not isinstance(output, torch.Tensor) and len(output) > 1:
                result.pipeline_refusal = "its layers give more than hidden states"
            extra = [
                key
                for key, value in (*enumerate(args), *kwargs.items())
                if isinstance(value, torch.Tensor)
                and not isinstance(value, seams.SeenMask)
                and value is not hidden
                and key not in _POSITIONAL
            ]
            if extra:
                word = extra[0] if isinstance(extra[0], str) else "a second input"
                result.pipeline_refusal = f"its layers take {word} beside hidden states"


def _weighty(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a decoder layer's arguments."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, torch.Tensor)
    return hidden


def accepts(model: nn.Module, name: str) -> bool:
    """Whether a model's forward names this argument."""
    return name in inspect.signature(model.forward).parameters
