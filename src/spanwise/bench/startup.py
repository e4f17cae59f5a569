"""``spanwise bench startup``: from the start of a process to its first token, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from spanwise.bench.children import Children
from spanwise.bench.job import Moment, StartJob, StartResult
from spanwise.bench.numbers import at_least
from spanwise.bench.outcome import Outcome, Panel, Series, Table
from spanwise.bench.page_cache import cached_share, drop, read_in, weight_files
from spanwise.bench.spread import spread

TOTAL = "process start to first token"


class StartupSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``folder`` and ``arguments`` are what ``LLM`` is started with.

    ``is_cold``: the weights leave the page cache before each run; else they are read into it.
    """

    model: str
    folder: str
    arguments: dict[str, Any]
    input_len: int
    num_runs: int
    is_cold: bool

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        at_least("input_len", self.input_len, 1)
        at_least("runs", self.num_runs, 1)


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One start: seconds by phase in their order, and what of the weights was in memory before."""

    phases_s: dict[str, float]
    total_s: float
    cached_share: float


def measure_startup(settings: StartupSettings, children: Children) -> Outcome:
    """Measure fresh processes, after one that is not counted. Raises InputError, EngineError."""
    children.expect(1 + settings.num_runs)
    files = weight_files(Path(settings.folder))
    _start("a start that is not counted", settings, children, files)
    found = [
        _start(f"start {number + 1} of {settings.num_runs}", settings, children, files)
        for number in range(settings.num_runs)
    ]
    starts = [start for start, _ in found]
    plan = found[0][1].plan
    names = list(starts[0].phases_s)
    spreads = {name: spread(start.phases_s[name] for start in starts) for name in names}
    total = spread(start.total_s for start in starts)
    rows = tuple(
        (name, *(f"{number:,.3f}" for number in (each.median, each.low, each.high)))
        for name, each in (spreads | {TOTAL: total}).items()
    )
    shares = spread(start.cached_share for start in starts)
    state = "cold" if settings.is_cold else "warm"
    labels = tuple(f"start {number + 1}" for number in range(len(starts)))
    return Outcome(
        name="startup",
        title=f"{settings.model}: start-up, page cache {state}; {plan.layout}",
        settings=settings,
        table=Table(("seconds", "median", "min", "max"), rows),
        notes=(
            f"page cache {state}: {shares.low:.0%} to {shares.high:.0%} of the weights' pages were "
            "in memory before each start; the programs' own files were, after one start before",
            "phases are those that the engine tells of; with one CPU device, torch and "
            "transformers are imported in 'config', else by the fork server, also in 'config'",
        ),
        results={"plan": plan, "phases_s": spreads, "total_s": total, "cached_share": shares},
        runs=starts,
        panels=(
            Panel(
                title=TOTAL,
                y_label="seconds",
                kind="stack",
                names=labels,
                series=tuple(
                    Series(label=name, y=tuple(start.phases_s[name] for start in starts))
                    for name in names
                ),
            ),
        ),
    )


def _start(
    name: str, settings: StartupSettings, children: Children, files: Sequence[Path]
) -> tuple[Start, StartResult]:
    (drop if settings.is_cold else read_in)(files)
    share = cached_share(files)
    job = StartJob(
        model=settings.folder, arguments=settings.arguments, input_len=settings.input_len
    )
    began_s = time.monotonic()
    result = children.run(name, job, StartResult)
    phases_s = phases_of([Moment("import", began_s), *result.phases], result.first_token_at_s)
    start = Start(phases_s=phases_s, total_s=result.first_token_at_s - began_s, cached_share=share)
    return start, result


def phases_of(moments: Sequence[Moment], end_s: float) -> dict[str, float]:
    """How long each phase lasted: until the next began, the last until ``end_s``."""
    borders = [*moments, Moment("end", end_s)]
    return {phase.name: after.at_s - phase.at_s for phase, after in pairwise(borders)}
