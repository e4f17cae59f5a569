"""Flags that several measurements take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

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


def engine_for(model: str, arguments: dict[str, Any], num_seats: int = 1) -> EngineConfig:
    """The engine's config, its model found; it has at least ``num_seats`` where none are given."""
    from spanwise.engine.config import OFFLINE_STEP_TOKENS, EngineConfig, engine_config
    from spanwise.model.folder import resolve_model

    seats = max(EngineConfig(model=model).max_num_seqs, num_seats)
    # The arguments first: a wrong one needs no model.
    engine_config(model, **arguments)
    defaults = {"max_num_seqs": seats, "max_step_tokens": OFFLINE_STEP_TOKENS}
    return engine_config(str(resolve_model(model)), **defaults | arguments)
