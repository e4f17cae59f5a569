"""Rotary tables that depend on a sequence's length, made to depend on that sequence alone.

transformers picks long-RoPE factors by the largest position in the batch (LongRoPE,
arXiv:2402.13753), so a long neighbour would change a short sequence's tokens. Here both tables are
computed and each token takes the one of its own sequence's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spanwise.errors import ModelError
from spanwise.model.context import ShardContext
from spanwise.model.parallel import replace_forward

Tables = tuple[torch.Tensor, torch.Tensor]


class _LongRope:
    """The forward of one rotary module: short or long factors, token by token."""

    def __init__(self, module: nn.Module, context: ShardContext, border: int) -> None:
        self.module, self.context, self.border = module, context, border
        self.inner: Callable[..., Tables] = module.forward
        rule = ROPE_INIT_FUNCTIONS["longrope"]
        self.short, _ = rule(module.config, torch.device("cpu"), seq_len=border)
        self.long, _ = rule(module.config, torch.device("cpu"), seq_len=border + 1)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> Tables:
        """``position_ids`` ``[1, tokens]`` to cosines and sines ``[1, tokens, dim]``."""
        is_long = (self.context.step.lengths > self.border)[None, :, None]
        short = self._with(self.short, x, position_ids, **options)
        long = self._with(self.long, x, position_ids, **options)
        return torch.where(is_long, long[0], short[0]), torch.where(is_long, long[1], short[1])

    def _with(self, factors: torch.Tensor, *args: Any, **options: Any) -> Tables:
        self.module.inv_freq = factors.to(args[0].device)
        return self.inner(*args, **options)


def long_rope_border(model: PreTrainedModel) -> int:
    """The sequence length beyond which long factors apply; 0 where the model has none.

    Raises ModelError where kinds of layers differ in it.
    """
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if any(isinstance(p, dict) and p.get("rope_type") == "longrope" for p in parameters.values()):
        raise ModelError("long-RoPE for some kinds of layers only is not supported yet")
    if parameters.get("rope_type") != "longrope":
        return 0
    return int(parameters["original_max_position_embeddings"])


def dynamic_limit(model: PreTrainedModel) -> int:
    """The longest sequence whose rotary table does not depend on its length; 0 for no limit.

    Dynamic NTK scaling would change every cached key with each token beyond it.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    dynamic = any("dynamic" in str(kind.get("rope_type")) for kind in kinds)
    return int(config.max_position_embeddings) if dynamic else 0


def _without_growth(kind: Any) -> Any:
    """A rotary kind, or one for each kind of layer, whose table does not look at the batch."""
    if isinstance(kind, dict):
        return {layer: _without_growth(own) for layer, own in kind.items()}
    return "default" if "dynamic" in kind or kind == "longrope" else kind


@contextmanager
def fixed_tables(model: PreTrainedModel) -> Iterator[None]:
    """Let no table look at the batch meanwhile; only shapes are wanted."""
    kinds = {module: module.__dict__.get("rope_type") for module in model.modules()}
    for module, kind in kinds.items():
        if kind is not None:
            module.__dict__["rope_type"] = _without_growth(kind)
    try:
        yield
    finally:
        for module, kind in kinds.items():
            if kind is not None:
                module.__dict__["rope_type"] = kind


def make_per_sequence(model: PreTrainedModel, context: ShardContext) -> None:
    """Replace every length-dependent rotary forward of the model."""
    border = long_rope_border(model)
    for module in model.modules():
        kind = module.__dict__.get("rope_type")
        if kind is None:
            continue
        # Up to ``dynamic_limit`` a dynamic table never grows; a long one is chosen here instead.
        module.__dict__["rope_type"] = _without_growth(kind)
        if border and kind == "longrope":
            replace_forward(module, _LongRope(module, context, border))
