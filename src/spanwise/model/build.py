"""Building a model of transformers without memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from spanwise.errors import ModelError, reason
from spanwise.model import seams
from spanwise.model.folder import read_config

# Written into buffers before their owner computes them, to notice one it does not.
_UNSET = -12345


def read_model_config(folder: str | Path) -> PretrainedConfig:
    """The folder's config as transformers reads it. Raises ModelError."""
    raw = read_config(Path(folder))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # config classes check what they like, and raise what they like
        raise ModelError(
            f"config.json of model_type {raw.get('model_type')!r} cannot be used: {reason(error)}"
        ) from error
    return config


def resolve_dtype(config: PretrainedConfig, wanted: str) -> torch.dtype:
    """The dtype to run in: ``auto`` takes the config's. Raises ModelError for an unknown one."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted == "auto":
        own = getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
        return own if isinstance(own, torch.dtype) else known[str(own)]
    if wanted not in known:
        raise ModelError(f"dtype {wanted!r} is not known; use auto, {', '.join(known)}")
    return known[wanted]


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model, every tensor on the meta device, reached through our seams.

    Raises ModelError where transformers has no causal language model for the config, or one that
    does not use the attention interface.
    """
    seams.register()
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"model_type {config.model_type!r} is not a causal language model of transformers; "
            "other models are run by spanwise.Model (see docs/any_model.md)"
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=seams.ATTENTION, dtype=dtype
            )
    except KeyError as error:
        if error.args != (seams.ATTENTION,):
            raise ModelError(f"{config.model_type} cannot be built: key {error}") from error
        raise ModelError(
            f"{config.model_type} does not use the attention interface; not supported yet"
        ) from error
    except (
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        AssertionError,
    ) as error:
        raise ModelError(f"{config.model_type} cannot be built: {reason(error)}") from error
    for part in _configs(model):
        part._experts_implementation = seams.EXPERTS
    # Only used to warn about padding, by looking at the data of every step. Past the config's own
    # check, which may want a number.
    model.config.__dict__["pad_token_id"] = None
    model.eval()
    model.requires_grad_(False)
    return model


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Choose which registered attention function all parts of the model look up."""
    for part in _configs(model):
        part._attn_implementation = name


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if isinstance(config, PretrainedConfig)]


@torch.no_grad()
def compute_buffers(model: PreTrainedModel) -> None:
    """Give every non-persistent buffer its value; parameters stay where they are.

    transformers computes such buffers (rotary frequencies, embedding scales) in ``_init_weights``,
    whose writes to parameters on the meta device do nothing. Raises ModelError for a buffer that
    is not computed there.
    """
    persistent = set(model.state_dict(keep_vars=True))
    for module_name, module in model.named_modules():
        names = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if f"{module_name}.{name}".lstrip(".") not in persistent and buffer.is_meta
        ]
        if not names:
            continue
        for name in names:
            fresh = torch.empty_like(module._buffers[name], device="cpu")
            module._buffers[name] = fresh.fill_(_UNSET if fresh.dtype != torch.bool else 0)
        _owner(model, module_name)._init_weights(module)
        _check_computed(module, module_name, names)


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model around a module: each knows how to initialise its own kinds."""
    while name:
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            return module
        name = name.rpartition(".")[0]
    return model


def _check_computed(module: nn.Module, module_name: str, names: list[str]) -> None:
    for name in names:
        buffer = module._buffers[name]
        assert buffer is not None
        if buffer.dtype != torch.bool and bool((buffer == _UNSET).any()):
            raise ModelError(
                f"{type(module).__name__} has a buffer {module_name}.{name} that transformers "
                "does not compute at load; this architecture is not supported"
            )
