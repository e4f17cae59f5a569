"""The flags that say which devices, which layout and which limits; names as in ``LLM``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from spanwise.cli.byte_size import parse_bytes
from spanwise.cli.numbers import parse_whole_numbers
from spanwise.types.worker import Quantization

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@Parameter(name="*", group=Group("Limits", sort_key=11))
@dataclass(frozen=True, kw_only=True)
class LimitFlags:
    """What an engine may take, on any devices. None is "not given": ``LLM`` chooses."""

    dtype: Annotated[Dtype, Parameter(help="Numbers to compute with; auto: the model's.")] = "auto"
    quantization: Annotated[
        Quantization | None,
        Parameter(
            help="The layers' linears in 8 bits. int8: on CPU devices; fp8: on CUDA cards of "
            "compute capability 8.9 or more. Default: none."
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        Parameter(help="Longest sequence in tokens. Default: the model's, or less."),
    ] = None
    max_num_seqs: Annotated[
        int | None, Parameter(help="Sequences computed at once in a copy. Default: 64.")
    ] = None
    max_step_tokens: Annotated[
        int | None, Parameter(help="Tokens computed in one step. Default: 2048; serve: 512.")
    ] = None
    kv_cache_memory: Annotated[
        str | None,
        Parameter(help="Memory of the KV caches: 2GiB, 512MB or bytes. Default: what is free."),
    ] = None
    prefix_caching: Annotated[
        bool, Parameter(help="Use again what was computed of a prompt's beginning.")
    ] = True

    def llm_arguments(self) -> dict[str, Any]:
        """Give what ``LLM`` takes: only what was set. Raises InputError."""
        given = _set(self)
        if self.kv_cache_memory is not None:
            given["kv_cache_memory"] = parse_bytes("--kv-cache-memory", self.kv_cache_memory)
        return given


@Parameter(name="*", group=Group("Devices and layout", sort_key=10))
@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """None is "not given": ``LLM`` chooses."""

    tensor_parallel_size: Annotated[
        int | None, Parameter(alias="-tp", help="Devices that share every layer.")
    ] = None
    pipeline_parallel_size: Annotated[
        int | None, Parameter(alias="-pp", help="Stages that the layers are cut into.")
    ] = None
    data_parallel_size: Annotated[
        int | None,
        Parameter(alias="-dp", help="Whole copies of the model. No size given: one a device."),
    ] = None
    enable_expert_parallel: Annotated[
        bool, Parameter(negative="", help="Whole experts on each device, not slices of each.")
    ] = False
    pp_layers: Annotated[
        str | None, Parameter(help="Layers of each stage by hand: 5,7. Default: balanced.")
    ] = None
    devices: Annotated[
        str | None,
        Parameter(help="cpu, cpu:4, cuda, cuda:0,1 or cuda:0*2. Default: all cards, else the CPU."),
    ] = None
    limits: LimitFlags = LimitFlags()

    def llm_arguments(self) -> dict[str, Any]:
        """Give what ``LLM`` takes: only what was set. Raises InputError."""
        given = _set(self) | self.limits.llm_arguments()
        del given["limits"]
        if self.pp_layers is not None:
            given["pp_layers"] = parse_whole_numbers("--pp-layers", [self.pp_layers])
        return given


def _set(flags: LimitFlags | EngineFlags) -> dict[str, Any]:
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    return {name: value for name, value in values.items() if value is not None}
