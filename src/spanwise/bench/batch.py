"""``spanwise bench batch``: throughput and latency against the batch size, and where it bends."""

from __future__ import annotations

import msgspec

from spanwise.bench.children import Children
from spanwise.bench.job import EngineJob
from spanwise.bench.knee import WORTH_IT, knee
from spanwise.bench.latency import LatencyResults, batch_load, latency_of
from spanwise.bench.numbers import at_least, rising
from spanwise.bench.outcome import Mark, Outcome, Panel, Series, Table
from spanwise.bench.rounds import run_rounds
from spanwise.bench.spread import Spread, spread
from spanwise.engine.config import EngineConfig


class BatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Each size of batch is given at once, and runs alone."""

    model: str
    engine: EngineConfig
    batch_sizes: tuple[int, ...]
    input_len: int
    output_len: int
    num_runs: int
    seed: int

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        rising("batch_sizes", self.batch_sizes)
        at_least("input_len", self.input_len, 1)
        at_least("output_len", self.output_len, 1)
        at_least("runs", self.num_runs, 1)


class BatchPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One batch size."""

    batch_size: int
    output_tokens_per_s: Spread
    latency: LatencyResults


def measure_batch(settings: BatchSettings, children: Children) -> Outcome:
    """Measure every size in turns, each in a fresh process. Raises InputError, EngineError."""
    jobs = {
        f"batch size {size}": EngineJob(
            engine=settings.engine,
            loads=(batch_load(size, settings.input_len, settings.output_len),),
            seed=settings.seed,
        )
        for size in settings.batch_sizes
    }
    found = run_rounds(children, jobs, settings.num_runs)
    points = []
    for size, results in zip(settings.batch_sizes, found.values(), strict=True):
        runs = [result.runs[0][0] for result in results]
        rate = spread(run.output_rate for run in runs)
        points.append(
            BatchPoint(batch_size=size, output_tokens_per_s=rate, latency=latency_of(runs))
        )
    bend = knee(settings.batch_sizes, [each.output_tokens_per_s.median for each in points])
    plan = next(iter(found.values()))[0].plan
    return Outcome(
        name="batch",
        title=(
            f"{settings.model}: batch sizes, {settings.input_len} in / {settings.output_len} out "
            f"tokens; {plan.layout}"
        ),
        settings=settings,
        table=_table(points, bend),
        notes=(
            _verdict(bend),
            f"medians (lowest..highest) of {settings.num_runs} runs in turns, each in a fresh "
            "process after a warm-up",
        ),
        results={"plan": plan, "points": points, "knee": bend},
        runs=found,
        panels=_panels(points, bend),
    )


def _verdict(bend: int | None) -> str:
    rule = f"doubling the batch gains less than {WORTH_IT:g}x throughput"
    if bend is None:
        return f"no knee: at none of these sizes is it that {rule}"
    return f"knee at batch size {bend}: from there on {rule}"


def _table(points: list[BatchPoint], bend: int | None) -> Table:
    rows = []
    for point in points:
        tpot = point.latency.tpot_s
        rows.append(
            (
                f"{point.batch_size}{' <- knee' if point.batch_size == bend else ''}",
                point.output_tokens_per_s.text(),
                point.latency.ttft_s.text(1000),
                "-" if tpot is None else tpot.text(1000, 2),
                point.latency.e2e_s.text(1000),
            )
        )
    columns = ("batch size", "output tokens/s", "first token ms", "per token ms", "end to end ms")
    return Table(columns, tuple(rows))


def _panels(points: list[BatchPoint], bend: int | None) -> tuple[Panel, ...]:
    marks = () if bend is None else (Mark(bend, f"knee: {bend}"),)
    rates = [point.output_tokens_per_s for point in points]
    tpots = [(point.batch_size, point.latency.tpot_s) for point in points if point.latency.tpot_s]
    ends = [point.latency.e2e_s for point in points]
    sizes = [point.batch_size for point in points]
    throughput = _series("output tokens/s", sizes, rates, 1)
    panels = [
        ("throughput", "output tokens/s", throughput),
        ("end to end", "milliseconds", _series("end to end", sizes, ends, 1000)),
    ]
    if tpots:
        own = _series("per token", [x for x, _ in tpots], [y for _, y in tpots], 1000)
        panels.insert(1, ("time per output token", "milliseconds", own))
    return tuple(
        Panel(title=title, x_label="batch size", y_label=label, series=(series,), marks=marks)
        for title, label, series in panels
    )


def _series(label: str, sizes: list[int], found: list[Spread], scale: float) -> Series:
    return Series(
        label=label,
        x=tuple(map(float, sizes)),
        y=tuple(each.median * scale for each in found),
        low=tuple(each.low * scale for each in found),
        high=tuple(each.high * scale for each in found),
    )
