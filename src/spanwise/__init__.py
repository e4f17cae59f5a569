"""Spanwise spreads model inference over the devices you have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spanwise.engine.llm import LLM
    from spanwise.types.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

# Imported when asked for: ``spanwise --help`` needs neither.
_HOMES = {"LLM": "spanwise.engine.llm", "SamplingParams": "spanwise.types.sampling"}


def __getattr__(name: str) -> Any:
    """Import what the package offers on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'spanwise' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
