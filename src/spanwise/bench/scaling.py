"""``spanwise bench scaling``: what more devices bring, for each way to use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from spanwise.bench.children import Children
from spanwise.bench.devices import placed, why_not
from spanwise.bench.job import (
    DescribeJob,
    DescribeResult,
    Device,
    EngineJob,
    Load,
    LoadRun,
)
from spanwise.bench.lengths import fixed
from spanwise.bench.numbers import at_least, rising
from spanwise.bench.outcome import Outcome, Panel, Series, Skipped, Table
from spanwise.bench.rounds import run_rounds
from spanwise.bench.spread import Spread, spread
from spanwise.engine.config import EngineConfig
from spanwise.errors import InputError
from spanwise.layout.request import LayoutRequest
from spanwise.types.model import ModelFacts

LayoutName = Literal["dp", "tp", "pp"]
_FEWEST_RUNS = 3
_BASE = "1 device"


class Workload(msgspec.Struct, frozen=True):
    """Tokens of every prompt and of every answer."""

    input_len: int
    output_len: int

    def __str__(self) -> str:
        return f"{self.input_len} in / {self.output_len} out"


class ScalingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``num_prompts`` at once of each workload, on each number of devices, in each layout.

    ``engine`` has neither devices nor a layout.
    """

    model: str
    engine: EngineConfig
    device: Device
    devices: tuple[int, ...]
    layouts: tuple[LayoutName, ...]
    workloads: tuple[Workload, ...]
    num_prompts: int
    num_runs: int
    seed: int

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        rising("devices", self.devices)
        at_least("num_prompts", self.num_prompts, 1)
        at_least("runs", self.num_runs, _FEWEST_RUNS)
        if not self.layouts or len(set(self.layouts)) < len(self.layouts):
            raise InputError(f"layouts must be some of dp,tp,pp, got {','.join(self.layouts)!r}")
        if not self.workloads:
            raise InputError("workloads must be one or more, such as 256/8,64/64")
        for workload in self.workloads:
            at_least("a workload's input", workload.input_len, 1)
            at_least("a workload's output", workload.output_len, 1)


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One layout on so many devices under one workload.

    ``speed_up``: over the rounds, the time on one device in that round by the time here.
    """

    workload: Workload
    layout: LayoutName | None
    devices: int
    input_tokens_per_s: Spread
    output_tokens_per_s: Spread
    speed_up: Spread

    @property
    def efficiency(self) -> float:
        """The part of the devices' worth that is had."""
        return self.speed_up.median / self.devices


def measure_scaling(settings: ScalingSettings, children: Children) -> Outcome:
    """Measure every layout in turns, each in a fresh process. Raises InputError, EngineError."""
    children.expect(1)
    describe = DescribeJob(folder=settings.engine.model, dtype=settings.engine.dtype)
    facts = children.run("the model's facts", describe, DescribeResult).facts
    jobs, skipped = jobs_and_skipped(settings, facts)
    alone = {name: job for name, (_, _, job) in jobs.items()}
    found = run_rounds(children, alone, settings.num_runs)
    points = []
    for number, workload in enumerate(settings.workloads):
        base = [result.runs[0][number] for result in found[_BASE]]
        for name, (layout, count, _) in jobs.items():
            own = [result.runs[0][number] for result in found[name]]
            points.append(_point(workload, layout, count, base, own))
    return Outcome(
        name="scaling",
        title=(
            f"{settings.model}: scaling, {settings.num_prompts} prompts at once, "
            f"{'one core a device' if settings.device == 'cpu' else 'cards'}"
        ),
        settings=settings,
        table=_table(points),
        notes=(
            *(f"not measured: {each.name}: {each.reason}" for each in skipped),
            f"medians (lowest..highest) of {settings.num_runs} rounds in turns, each layout in a "
            "fresh process after a warm-up; speed-up: against 1 device in the same round",
            *_core_note(settings.device),
        ),
        results={
            "points": [_builtins(point) for point in points],
            "skipped": skipped,
            "plans": {name: results[0].plan for name, results in found.items()},
        },
        runs=found,
        panels=tuple(_panel(workload, points) for workload in settings.workloads),
    )


def layout_on(name: LayoutName, count: int) -> LayoutRequest:
    """All devices in one degree."""
    match name:
        case "dp":
            return LayoutRequest(data_parallel_size=count)
        case "tp":
            return LayoutRequest(tensor_parallel_size=count)
        case "pp":
            return LayoutRequest(pipeline_parallel_size=count)


def jobs_and_skipped(
    settings: ScalingSettings, facts: ModelFacts
) -> tuple[dict[str, tuple[LayoutName | None, int, EngineJob]], list[Skipped]]:
    """What to measure by name, one device first; and what cannot be. Raises InputError."""
    one = layout_on("dp", 1)
    if problem := why_not(one, facts, settings.device, 1):
        raise InputError(f"even one device cannot be: {problem}")
    jobs: dict[str, tuple[LayoutName | None, int, EngineJob]] = {
        _BASE: (None, 1, _job(settings, one, 1))
    }
    skipped = []
    for count in settings.devices:
        for name in settings.layouts:
            layout = layout_on(name, count)
            if count == 1:
                continue  # all the same
            if problem := why_not(layout, facts, settings.device, count):
                skipped.append(Skipped(f"{name}={count}", problem))
            else:
                jobs[f"{name}={count}"] = (name, count, _job(settings, layout, count))
    return jobs, skipped


def _job(settings: ScalingSettings, layout: LayoutRequest, count: int) -> EngineJob:
    return EngineJob(
        engine=placed(settings.engine, layout, settings.device, count),
        loads=tuple(
            Load(
                num_requests=settings.num_prompts,
                input_len=fixed(workload.input_len),
                output_len=fixed(workload.output_len),
            )
            for workload in settings.workloads
        ),
        seed=settings.seed,
        num_cores=count if settings.device == "cpu" else None,
    )


def _point(
    workload: Workload,
    layout: LayoutName | None,
    count: int,
    base: Sequence[LoadRun],
    own: Sequence[LoadRun],
) -> Point:
    pairs = zip(base, own, strict=True)
    return Point(
        workload=workload,
        layout=layout,
        devices=count,
        input_tokens_per_s=spread(run.input_rate for run in own),
        output_tokens_per_s=spread(run.output_rate for run in own),
        speed_up=spread(first.elapsed_s / run.elapsed_s for first, run in pairs),
    )


def _core_note(device: Device) -> tuple[str, ...]:
    if device == "cuda":
        return ()
    return ("n devices and the engine that feeds them have n cores together",)


def _builtins(point: Point) -> dict[str, object]:
    fields: dict[str, object] = msgspec.structs.asdict(point)
    return fields | {"efficiency": point.efficiency}


def _table(points: Sequence[Point]) -> Table:
    columns = ("tokens", "layout", "devices", "input tok/s", "output tok/s", "speed-up",
               "efficiency")  # fmt: skip
    rows = tuple(
        (
            str(point.workload),
            point.layout or "-",
            str(point.devices),
            f"{point.input_tokens_per_s.median:,.1f}",
            f"{point.output_tokens_per_s.median:,.1f}",
            point.speed_up.text(digits=2),
            f"{point.efficiency:.0%}",
        )
        for point in points
    )
    return Table(columns, rows, num_names=2)


def _panel(workload: Workload, points: Sequence[Point]) -> Panel:
    own = [point for point in points if point.workload == workload]
    counts = tuple(float(count) for count in sorted({point.devices for point in own}))
    ideal = Series(label="ideal", x=counts, y=counts, is_ideal=True)
    names = dict.fromkeys(point.layout for point in own if point.layout is not None)
    lines = [_line(name, [each for each in own if each.layout in (None, name)]) for name in names]
    return Panel(
        title=str(workload),
        x_label="devices",
        y_label="speed-up",
        series=(*lines, ideal),
    )


def _line(name: str, points: Sequence[Point]) -> Series:
    return Series(
        label=name,
        x=tuple(float(point.devices) for point in points),
        y=tuple(point.speed_up.median for point in points),
        low=tuple(point.speed_up.low for point in points),
        high=tuple(point.speed_up.high for point in points),
    )
