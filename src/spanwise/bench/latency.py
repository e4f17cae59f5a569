"""``spanwise bench latency``: how long one batch takes, from its start to its last token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from spanwise.bench.children import Children
from spanwise.bench.job import EngineJob, EngineResult, Load, LoadRun
from spanwise.bench.lengths import fixed
from spanwise.bench.numbers import at_least
from spanwise.bench.outcome import Outcome, Panel, Series, Table
from spanwise.bench.spread import Spread, spread
from spanwise.engine.config import EngineConfig

_NAMES = {
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "e2e_s": "end to end",
}


class LatencySettings(msgspec.Struct, frozen=True, kw_only=True):
    """``batch_size`` prompts of ``input_len`` tokens at once, ``output_len`` tokens each."""

    model: str
    engine: EngineConfig
    input_len: int
    output_len: int
    batch_size: int
    num_runs: int
    seed: int

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        at_least("input_len", self.input_len, 1)
        at_least("output_len", self.output_len, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("runs", self.num_runs, 1)


class LatencyResults(msgspec.Struct, frozen=True, kw_only=True):
    """Over the runs. ``tpot_s`` is None where an answer has one token."""

    ttft_s: Spread
    tpot_s: Spread | None
    e2e_s: Spread


def measure_latency(settings: LatencySettings, children: Children) -> Outcome:
    """Measure all runs in one fresh process, after a warm-up. Raises InputError, EngineError."""
    children.expect(1)
    job = EngineJob(
        engine=settings.engine,
        loads=(batch_load(settings.batch_size, settings.input_len, settings.output_len),),
        num_runs=settings.num_runs,
        seed=settings.seed,
    )
    found = children.run("latency", job, EngineResult)
    runs = [loads[0] for loads in found.runs]
    results = latency_of(runs)
    spreads = {key: getattr(results, key) for key in _NAMES}
    rows = [
        (_NAMES[key], *_milliseconds(each.median, each.low, each.high))
        for key, each in spreads.items()
        if each is not None
    ]
    return Outcome(
        name="latency",
        title=(
            f"{settings.model}: latency of {settings.batch_size} at once, {settings.input_len} in "
            f"/ {settings.output_len} out tokens; {found.plan.layout}"
        ),
        settings=settings,
        table=Table(("milliseconds", "median", "min", "max"), tuple(rows)),
        notes=(
            f"{settings.num_runs} runs in one process after a warm-up; of a batch, the median of "
            "its sequences, and end to end the last token of all; no tokenizer takes part",
        ),
        results={"plan": found.plan, **spreads},
        runs=found.runs,
        panels=tuple(
            per_run(_NAMES[key], "milliseconds", [time_s * 1000 for time_s in times_s])
            for key, times_s in _of_runs(runs).items()
            if times_s
        ),
    )


def batch_load(batch_size: int, input_len: int, output_len: int) -> Load:
    """So many prompts of one length, which run together."""
    return Load(
        num_requests=batch_size,
        input_len=fixed(input_len),
        output_len=fixed(output_len),
        is_batch=True,
    )


def latency_of(runs: Iterable[LoadRun]) -> LatencyResults:
    """Of each run the median over its sequences; end to end is until the last of them ends."""
    found = _of_runs(list(runs))
    return LatencyResults(
        ttft_s=spread(found["ttft_s"]),
        tpot_s=spread(found["tpot_s"]) if found["tpot_s"] else None,
        e2e_s=spread(found["e2e_s"]),
    )


def per_run(title: str, label: str, values: Sequence[float]) -> Panel:
    """A bar for each run."""
    return Panel(
        title=title,
        x_label="run",
        y_label=label,
        kind="bars",
        names=tuple(str(number + 1) for number in range(len(values))),
        series=(Series(label=label, y=tuple(values)),),
    )


def _of_runs(runs: Sequence[LoadRun]) -> dict[str, list[float]]:
    return {
        "ttft_s": [median(request.ttft_s for request in run.requests) for run in runs],
        "tpot_s": [tpot for run in runs if (tpot := _median_tpot_s(run)) is not None],
        "e2e_s": [run.elapsed_s for run in runs],
    }


def _median_tpot_s(run: LoadRun) -> float | None:
    """The median over the sequences that have a second token; None where none has."""
    times = [tpot for request in run.requests if (tpot := request.tpot_s) is not None]
    return median(times) if times else None


def _milliseconds(*times_s: float) -> tuple[str, ...]:
    return tuple(f"{time_s * 1000:,.2f}" for time_s in times_s)
