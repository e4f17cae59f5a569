"""What an engine is started with."""

from __future__ import annotations

import msgspec

from spanwise.errors import InputError
from spanwise.layout.request import LayoutRequest


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A model, devices, a layout and limits; None leaves a choice to the engine.

    ``kv_cache_memory`` is in bytes, for all devices of one host together.
    """

    model: str
    devices: str | None = None
    layout: LayoutRequest = LayoutRequest()
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_step_tokens: int = 512
    block_size: int = 16
    kv_cache_memory: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError for a limit below 1."""
        for name in ("max_model_len", "max_num_seqs", "max_step_tokens", "block_size",
                     "kv_cache_memory"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
