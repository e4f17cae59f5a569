"""What an engine is started with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import msgspec

from spanwise.control.admission import AdmissionLimits
from spanwise.errors import InputError
from spanwise.layout.request import LayoutRequest
from spanwise.scheduler.config import Batching
from spanwise.types.worker import Quantization

# Where nobody waits between two tokens: fewer prompts are cut, and histories are read less often.
OFFLINE_STEP_TOKENS = 2048


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A model, devices, a layout and limits; None leaves a choice to the engine.

    ``kv_cache_memory`` is in bytes, for all devices of one host together. ``batching`` and its
    two limits are the scheduler's, see ``SchedulerConfig``. ``quantization`` rounds the
    weights of the decoder layers' linears as they are loaded.
    """

    model: str
    devices: str | None = None
    layout: LayoutRequest = LayoutRequest()
    dtype: str = "auto"
    quantization: Quantization | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_step_tokens: int = 512
    block_size: int = 16
    kv_cache_memory: int | None = None
    prefix_caching: bool = True
    batching: Batching = "continuous"
    batch_size: int | None = None
    batch_window_s: float = 0.1

    def __post_init__(self) -> None:
        """Raise InputError for a limit below 1 or an unknown quantization."""
        for name in ("max_model_len", "max_num_seqs", "max_step_tokens", "block_size",
                     "kv_cache_memory"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        known = get_args(Quantization)
        if self.quantization is not None and self.quantization not in known:
            raise InputError(
                f"quantization {self.quantization!r} is not known; use {', '.join(known)}"
            )


def engine_config(
    model: str,
    *,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int | None = None,
    data_parallel_size: int | None = None,
    enable_expert_parallel: bool = False,
    pp_layers: Sequence[int] | None = None,
    **limits: Any,
) -> EngineConfig:
    """The config for arguments as ``LLM`` takes them. Raises InputError."""
    layout = LayoutRequest(
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        data_parallel_size=data_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        pp_layers=None if pp_layers is None else tuple(pp_layers),
    )
    return EngineConfig(model=str(model), layout=layout, **limits)


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An engine in processes of its own, and how much may wait for it.

    ``silent_after_s``: a rank that has not answered for so long is not healthy.
    ``resume_window_s``: how long an answer that may be asked for again is kept after its end.
    """

    engine: EngineConfig
    admission: AdmissionLimits = AdmissionLimits()
    silent_after_s: float = 15.0
    resume_window_s: float = 60.0

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        if not 0 <= self.resume_window_s < float("inf"):
            raise InputError(
                f"resume_window must be a number from 0 up, got {self.resume_window_s}"
            )
