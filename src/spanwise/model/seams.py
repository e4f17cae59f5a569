"""The seams through which a transformers model is reached, and nothing else of it is changed.

Three registered functions (attention, experts, and a mask builder used only while probing) and a
``Cache``-shaped object. Each hands over to an object hung on the module itself, so that no global
holds a current batch or rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spanwise.errors import ModelError

ATTENTION = "spanwise"
PROBE_ATTENTION = "spanwise_probe"
EXPERTS = "spanwise"
_HANDLER = "_spanwise_handler"


class AttentionHandler(Protocol):
    """Computes one layer's attention."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """``query`` ``[1, heads, tokens, dim]`` to ``[1, tokens, heads, value_dim]``."""
        ...


class ExpertsHandler(Protocol):
    """Computes one layer's routed experts; ``[tokens, hidden]`` to the same."""

    def mix(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Answer the registered experts function's call; index and weights ``[tokens, top_k]``."""
        ...


def set_handler(module: nn.Module, handler: object) -> None:
    """Hang ``handler`` on an attention or experts module, in place of an earlier one."""
    module.__dict__[_HANDLER] = handler


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    handler: AttentionHandler = module.__dict__[_HANDLER]
    return handler.attend(query, key, value, attention_mask=attention_mask, **options), None


def _experts(
    module: nn.Module,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    handler: ExpertsHandler = module.__dict__[_HANDLER]
    return handler.mix(module, hidden, top_k_index, top_k_weights)


class SeenMask(torch.Tensor):
    """Stands for a mask while probing and carries the function that would have built it."""

    mask_function: Callable[..., torch.Tensor]


class SeenPositions(torch.Tensor):
    """Stands for the positions while probing and notes whether a value is computed from them."""

    reached: list[bool]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Whole numbers made from positions are positions; anything else is a use of them."""
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        source = next((a for a in tree_leaves((args, kwargs)) if isinstance(a, cls)), None)
        if source is None or not isinstance(out, torch.Tensor) or isinstance(out, cls):
            return out
        if out.is_floating_point():
            source.reached.append(True)
            return out
        return seen_positions(out, source.reached)


def seen_positions(positions: torch.Tensor, reached: list[bool]) -> SeenPositions:
    """``positions`` watched: ``reached`` is not empty once anything is computed from them."""
    seen = positions.as_subclass(SeenPositions)
    seen.reached = reached
    return seen


def _probe_mask(mask_function: Callable[..., torch.Tensor], **_: Any) -> torch.Tensor:
    mask = torch.empty(1, 1, 1, 1, device="meta").as_subclass(SeenMask)
    mask.mask_function = mask_function
    return mask


def _probe_mask_seam(*args: Any, **options: Any) -> torch.Tensor:
    return _probe_mask(**options)


_NO_STATE = (
    "a layer keeps convolution, recurrent or indexer state, which is not supported yet; "
    "use a model whose every layer is attention"
)


class _NoLayers(list[Any]):
    """The layers of a cache that shows none: who reaches for one wants more than attention."""

    def __getitem__(self, _: object) -> NoReturn:
        raise ModelError(_NO_STATE)


class CacheShape(Cache):
    """What a transformers model may ask of a cache whose sequences it does not know."""

    def __init__(self) -> None:
        self.layers = _NoLayers()
        self.layer_class_to_replicate = None
        self.offloading = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so nothing may be derived from this."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Only asked for while probing."""
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Only asked for while probing."""
        return 0

    def _no_state(self, *_: Any, **__: Any) -> NoReturn:
        raise ModelError(_NO_STATE)

    get_conv_state = update_conv_state = _no_state
    get_recurrent_state = update_recurrent_state = _no_state
    has_previous_state = update_indexer = _no_state


def register() -> None:
    """Make the seams known to transformers; again is harmless."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    ALL_ATTENTION_FUNCTIONS.register(PROBE_ATTENTION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE_ATTENTION, _probe_mask_seam)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)
