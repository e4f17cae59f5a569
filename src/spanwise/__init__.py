"""Spanwise spreads model inference over the devices you have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spanwise.engine.llm import LLM
    from spanwise.engine.model import Model
    from spanwise.engine.model import map_items as map
    from spanwise.engine.queue import Queue
    from spanwise.types.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Model", "Queue", "SamplingParams", "__version__", "map"]

# Imported when asked for: ``spanwise --help`` needs none.
_HOMES = {
    "LLM": ("spanwise.engine.llm", "LLM"),
    "Model": ("spanwise.engine.model", "Model"),
    "Queue": ("spanwise.engine.queue", "Queue"),
    "SamplingParams": ("spanwise.types.sampling", "SamplingParams"),
    "map": ("spanwise.engine.model", "map_items"),
}


def __getattr__(name: str) -> Any:
    """Import what the package offers on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'spanwise' has no attribute {name!r}")
    module, own_name = _HOMES[name]
    return getattr(importlib.import_module(module), own_name)
