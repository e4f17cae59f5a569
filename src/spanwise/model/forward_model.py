"""Models that are run by one forward: those of transformers, and any module a factory makes."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from spanwise.errors import ModelError, reason
from spanwise.model.build import read_model_config, resolve_dtype
from spanwise.model.folder import is_factory
from spanwise.model.sentence import SentenceEncoder, read_pooling
from spanwise.types.forward import InputSpec

_TEXT, _MASK = "input_ids", "attention_mask"
_DECODER = "decoder_input_ids"
# One number for each token; other outputs have at least two dims for each.
_PER_TOKEN = frozenset({"start_logits", "end_logits"})
_CLASSIFY_TOKENS = frozenset({"ElectraForPreTraining"})
# Encoders whose convolutions, blocks or landmarks see what was filled up, whatever the mask says.
_SEE_FILLING = frozenset(
    {"big_bird", "canine", "convbert", "fnet", "funnel", "longformer", "nystromformer", "yoso"}
)
# What compares the items of a batch with one another, and so belongs to none of them.
_OF_WHOLE_BATCH = frozenset({"logits_per_image", "logits_per_text", "loss"})


class NamedForward(nn.Module):
    """A module called with tensors in the order of ``input_names``, which gives a tuple of tensors.

    ``output_names`` are those of the last call: the keys of what the module gave where that was a
    mapping, else "output", or "output_0" and so on. What is no tensor with the batch's dim is left
    out.
    """

    def __init__(self, module: nn.Module, input_names: Sequence[str], **options: Any) -> None:
        super().__init__()
        self.module, self.input_names, self.options = module, tuple(input_names), options
        self.output_names: tuple[str, ...] = ()
        self.training = module.training

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``tensors[i]`` ``[items, ...]`` is the input ``input_names[i]``."""
        named = dict(zip(self.input_names, tensors, strict=True))
        given = _named(self.module(**named, **self.options))
        if torch.compiler.is_exporting():  # whose sizes are not to be compared; it was run before
            return tuple(given[name] for name in self.output_names)
        own = _own_tensors(given, len(tensors[0]))
        self.output_names = tuple(own)
        return tuple(own.values())


@dataclass(frozen=True)
class ForwardModel:
    """A model with what it takes; ``options`` are given to its forward beside the inputs."""

    module: nn.Module
    inputs: tuple[InputSpec, ...]
    labels: tuple[str, ...]
    architecture: str
    model_type: str
    dtype: str
    options: Mapping[str, Any]

    def lengths_of(self, name: str, num_dims: int) -> Callable[[int], int] | None:
        """How long an output is along dim 1, by the length of the input that is filled up.

        None for an output that has no such dim: what a decoder gives is as long as its own input.
        """
        has_decoder = any(spec.name == _DECODER for spec in self.inputs)
        if has_decoder and not name.startswith("encoder_"):
            return None
        of_tokens = type(self.module).__name__ in _CLASSIFY_TOKENS or name in _PER_TOKEN
        if num_dims < 3 and not of_tokens:
            return None
        frames = getattr(self.module, "_get_feat_extract_output_lengths", None)
        if frames is None:
            return lambda length: length
        return lambda length: int(frames(torch.tensor([length]))[0])

    def named(self, input_names: Sequence[str]) -> NamedForward:
        """The model, called with these inputs in this order."""
        return NamedForward(self.module, input_names, **self.options)


def load_forward_model(source: str, dtype: str) -> ForwardModel:
    """Build and load a model: from a folder, or by ``module:factory``. Raises ModelError."""
    if is_factory(source):
        return _by_factory(source, dtype)
    config = read_model_config(source)
    kind = forward_class(config, source)
    wanted = resolve_dtype(config, dtype)
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = kind.from_pretrained(
            source, config=config, dtype=wanted, local_files_only=True, output_loading_info=True
        )
        model, report = loaded
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{source} cannot be loaded: {reason(error)}") from error
    finally:
        if progress:
            logging.enable_progress_bar()
    _require_complete(source, report)
    model.eval().requires_grad_(False)
    return _pooled(_described(model, config, wanted), source)


def describe_forward_model(source: str, dtype: str) -> ForwardModel:
    """As ``load_forward_model`` for a folder, without weights: on the meta device."""
    config = read_model_config(source)
    wanted = resolve_dtype(config, dtype)
    try:
        with torch.device("meta"):
            model = forward_class(config, source)._from_config(config, dtype=wanted)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{config.model_type} cannot be built: {reason(error)}") from error
    return _pooled(_described(model.eval(), config, wanted), source)


def _pooled(model: ForwardModel, source: str) -> ForwardModel:
    """With the pooling that its folder says it has."""
    pooling = read_pooling(Path(source))
    if pooling is None:
        return model
    return replace(model, module=SentenceEncoder(model.module, *pooling), options={})


def forward_class(config: PretrainedConfig, source: str) -> type[PreTrainedModel]:
    """The class of transformers that a config names. Raises ModelError."""
    named = getattr(config, "architectures", None) or ()
    found: Any = next((kind for n in named if (kind := getattr(transformers, n, None))), None)
    if found is None:
        raise ModelError(
            f"config.json of {Path(source).name} names no class of transformers in "
            f"'architectures' ({', '.join(named) or 'none'}); name one, or give a module:factory"
        )
    model_class: type[PreTrainedModel] = found
    return model_class


def _by_factory(source: str, dtype: str) -> ForwardModel:
    module, _, name = source.partition(":")
    where = os.getcwd()
    if where not in sys.path:  # as python itself does for a script's own folder
        sys.path.insert(0, where)
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
    except Exception as error:  # what is imported is the user's own code
        raise ModelError(f"{source} cannot be imported: {reason(error)}") from error
    try:
        built = made()
    except Exception as error:  # the factory is the user's own code
        raise ModelError(f"{source} failed: {reason(error, expected=False)}") from error
    if not isinstance(built, nn.Module):
        raise ModelError(
            f"{source} gave {type(built).__name__}, not a torch.nn.Module; return the module"
        )
    built.eval().requires_grad_(False)
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelError(f"dtype {dtype!r} is not known; use auto, {', '.join(_DTYPES)}")
        built.to(_DTYPES[dtype])
    return ForwardModel(
        module=built,
        inputs=_of_signature(built),
        labels=(),
        architecture=type(built).__name__,
        model_type="module",
        dtype=_dtype_of(built),
        options={},
    )


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _dtype_of(module: nn.Module) -> str:
    """That of its weights; "" where it has none."""
    floating = (t.dtype for t in module.parameters() if t.is_floating_point())
    return str(next(floating, "")).removeprefix("torch.")


def _of_signature(module: nn.Module) -> tuple[InputSpec, ...]:
    """The inputs of a module that says nothing but their names."""
    named = [
        InputSpec(name=name, optional=parameter.default is not inspect.Parameter.empty)
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if not named:
        raise ModelError(
            f"the forward of {type(module).__name__} names no arguments; give it names instead of "
            "*args"
        )
    return tuple(named)


# -- models of transformers --------------------------------------------------------------------


def _described(
    model: PreTrainedModel, config: PretrainedConfig, dtype: torch.dtype
) -> ForwardModel:
    accepted = inspect.signature(model.forward).parameters
    options = {"return_dict": True} if "return_dict" in accepted else {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    labels = getattr(config, "id2label", None) or {}
    named = str(dtype).removeprefix("torch.")
    return ForwardModel(
        module=model,
        inputs=_inputs_of(model, config, named, list(accepted)),
        labels=tuple(str(labels[index]) for index in sorted(labels)) if _classifies(model) else (),
        architecture=type(model).__name__,
        model_type=str(config.model_type),
        dtype=named,
        options=options,
    )


def _classifies(model: PreTrainedModel) -> bool:
    return "Classification" in type(model).__name__


def _inputs_of(
    model: PreTrainedModel, config: PretrainedConfig, dtype: str, accepted: Sequence[str]
) -> tuple[InputSpec, ...]:
    """What a class of transformers takes, by the names of its arguments."""
    makers: dict[str, Callable[[], tuple[InputSpec, ...]]] = {
        "pixel_values": lambda: (_image(model, config, dtype),),
        "input_features": lambda: (_features(config, dtype),),
        "input_values": lambda: _audio(config, dtype),
        _TEXT: lambda: _text(config, accepted),
    }
    found = [spec for name, make in makers.items() if name in accepted for spec in make()]
    if _DECODER in accepted:
        found.append(InputSpec(name=_DECODER, dtype="int64", shape=(None,)))
    if not found:
        raise ModelError(
            f"{type(model).__name__} takes {', '.join(accepted)}: none of "
            f"{', '.join(makers)}; wrap it in a module of your own and give module:factory"
        )
    return tuple(found)


def _image(model: PreTrainedModel, config: PretrainedConfig, dtype: str) -> InputSpec:
    """An image, or frames; its sides are open where the model has no place for each patch."""
    own: Any = getattr(config, "vision_config", config)
    has_places = any("position_embedding" in name for name, _ in model.named_parameters())
    size = getattr(own, "image_size", None) if has_places else None
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    frames = (own.num_frames,) if hasattr(own, "num_frames") else ()
    channels = getattr(own, "num_channels", 3)
    return InputSpec(name="pixel_values", dtype=dtype, shape=(*frames, channels, *sides))


def _features(config: PretrainedConfig, dtype: str) -> InputSpec:
    """Spectra. Those of a model with a place for each frame are all of one length."""
    bins = getattr(config, "num_mel_bins", None)
    places = getattr(config, "max_source_positions", None)
    frames = None if places is None or bins is None else 2 * places
    return InputSpec(name="input_features", dtype=dtype, shape=(bins, frames))


def _text(config: PretrainedConfig, accepted: Sequence[str]) -> tuple[InputSpec, ...]:
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    fills = _MASK in accepted and config.model_type not in _SEE_FILLING
    ids = InputSpec(
        name=_TEXT, dtype="int64", shape=(None,), pad=float(pad or 0) if fills else None
    )
    mask = InputSpec(name=_MASK, dtype="int64", shape=(None,), pad=0.0, like=_TEXT)
    types = InputSpec(
        name="token_type_ids", dtype="int64", shape=(None,), pad=0.0, like=_TEXT, value=0
    )
    return tuple(spec for spec in (ids, mask, types) if spec.name in accepted)


def _audio(config: PretrainedConfig, dtype: str) -> tuple[InputSpec, ...]:
    """Samples. A norm over each whole clip would see what a clip was filled up with."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # spectra, by that name
        shape = (config.max_length, config.num_mel_bins)
        return (InputSpec(name="input_values", dtype=dtype, shape=shape),)
    fills = getattr(config, "feat_extract_norm", "") == "layer"
    values = InputSpec(name="input_values", dtype=dtype, shape=(None,), pad=0.0 if fills else None)
    mask = InputSpec(name=_MASK, dtype="int64", shape=(None,), pad=0.0, like="input_values")
    return (values, mask) if fills else (values,)


def _require_complete(source: str, report: Mapping[str, Any]) -> None:
    missing = sorted(map(str, report.get("missing_keys") or ()))
    wrong = report.get("mismatched_keys") or ()
    if missing:
        raise ModelError(
            f"the weights of {source} lack '{missing[0]}' and {len(missing) - 1} more that "
            "config.json asks for; use the config.json and the weights of the same model"
        )
    if wrong:
        raise ModelError(
            f"the weights of {source} have another shape than config.json says, first "
            f"'{sorted(map(str, wrong))[0]}'; use the config.json and the weights of the same model"
        )


def _named(given: Any) -> dict[str, Any]:
    """What a module gave, by name."""
    if isinstance(given, torch.Tensor):
        return {"output": given}
    if isinstance(given, Mapping):
        return {str(name): value for name, value in given.items()}
    if isinstance(given, Sequence):
        return {f"output_{index}": value for index, value in enumerate(given)}
    raise ModelError(
        f"the model gave {type(given).__name__}; give a tensor, or a tuple or dict of tensors"
    )


def _own_tensors(named: Mapping[str, Any], num_items: int) -> dict[str, torch.Tensor]:
    """Those with a row for each item of the batch."""
    found = {
        name: value
        for name, value in named.items()
        if isinstance(value, torch.Tensor)
        and value.dim()
        and value.shape[0] == num_items
        and name not in _OF_WHOLE_BATCH
    }
    if not found:
        raise ModelError("the model gave no tensor with a row for each item of the batch")
    return found
