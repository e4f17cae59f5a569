"""Flags that several measurements take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from spanwise.cli.byte_size import parse_bytes
from spanwise.cli.engine_flags import Dtype
from spanwise.types.worker import Quantization

if TYPE_CHECKING:
    from spanwise.engine.config import EngineConfig

Model = Annotated[
    str, Parameter(help="A folder, spanwise/tiny-dense, spanwise/tiny-moe, or a hub name.")
]
Runs = Annotated[int, Parameter(help="How often each is measured; medians are shown.")]
Seed = Annotated[int, Parameter(help="The same seed: the same prompts.")]


@Parameter(name="*", group=Group("Results", sort_key=90))
@dataclass(frozen=True, kw_only=True)
class ResultFlags:
    """Where results go beside the table."""

    output: Annotated[str, Parameter(help="A folder for the JSON and the picture.")] = (
        "bench-results"
    )
    quiet: Annotated[bool, Parameter(negative="", help="Print nothing but the results.")] = False


@Parameter(name="*", group=Group("Limits", sort_key=10))
@dataclass(frozen=True, kw_only=True)
class LimitFlags:
    """The engine's limits, where the measurement itself chooses devices and layouts."""

    dtype: Annotated[Dtype, Parameter(help="Numbers to compute with; auto: the model's.")] = "auto"
    quantization: Annotated[
        Quantization | None,
        Parameter(help="int8: the layers' linears in 8 bits, on CPU devices. Default: none."),
    ] = None
    max_model_len: Annotated[
        int | None, Parameter(help="Longest sequence in tokens. Default: the model's, or less.")
    ] = None
    max_num_seqs: Annotated[
        int | None, Parameter(help="Sequences computed at once in a copy. Default: 64.")
    ] = None
    max_step_tokens: Annotated[
        int | None, Parameter(help="Tokens computed in one step. Default: 512.")
    ] = None
    kv_cache_memory: Annotated[
        str | None, Parameter(help="Memory of the KV caches: 2GiB. Default: what is free.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Give what ``LLM`` takes: only what was set. Raises InputError."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value}
        if self.kv_cache_memory is not None:
            given["kv_cache_memory"] = parse_bytes("--kv-cache-memory", self.kv_cache_memory)
        return given


def engine_for(model: str, arguments: dict[str, Any], num_seats: int = 1) -> EngineConfig:
    """The engine's config, its model found; it has at least ``num_seats`` where none are given."""
    from spanwise.engine.config import EngineConfig, engine_config
    from spanwise.model.folder import resolve_model

    seats = max(EngineConfig(model=model).max_num_seqs, num_seats)
    # The arguments first: a wrong one needs no model.
    engine_config(model, **arguments)
    return engine_config(str(resolve_model(model)), **{"max_num_seqs": seats} | arguments)
