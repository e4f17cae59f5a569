"""``spanwise bench methods``: one model spread over the same devices in every way there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from spanwise.bench.children import Children
from spanwise.bench.devices import placed, why_not
from spanwise.bench.job import DescribeJob, DescribeResult, Device, EngineJob, EngineResult, Load
from spanwise.bench.latency import LatencyResults, batch_load, latency_of
from spanwise.bench.lengths import fixed
from spanwise.bench.numbers import at_least
from spanwise.bench.outcome import Outcome, Panel, Series, Skipped, Table
from spanwise.bench.rounds import run_rounds
from spanwise.bench.spread import Spread, spread
from spanwise.bench.traffic import decode_step_bytes
from spanwise.engine.config import EngineConfig
from spanwise.errors import InputError
from spanwise.layout.request import LayoutRequest
from spanwise.model.folder import read_config
from spanwise.types.model import ModelFacts

_EXPERTS_PER_TOKEN = "num_experts_per_tok"
# What is, today; a measurement of recovery belongs here when there is one.
ONE_DEATH = "the engine ends: every request in flight on every device fails, and a server exits"


class MethodsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``num_prompts`` at once for throughput, one alone for latency. ``engine`` has no layout."""

    model: str
    engine: EngineConfig
    device: Device
    num_devices: int
    num_prompts: int
    input_len: int
    output_len: int
    num_runs: int
    seed: int

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        at_least("devices", self.num_devices, 2)
        at_least("num_prompts", self.num_prompts, 1)
        at_least("input_len", self.input_len, 1)
        at_least("output_len", self.output_len, 1)
        at_least("runs", self.num_runs, 1)


@dataclass(frozen=True)
class Method:
    """A way to use devices. ``is_queue``: a device gets a request when it has ended its last."""

    name: str
    layout: LayoutRequest
    one_micro_batch: bool = False
    is_queue: bool = False


class MethodPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One method. ``weight_bytes`` and ``cache_bytes`` are those of the fullest device.

    ``step_bytes`` are computed, of a decode step of all prompts; None where the model's config
    does not say what they depend on.
    """

    method: str
    layout: str
    weight_bytes: int
    cache_bytes: int
    step_bytes: int | None
    latency: LatencyResults
    output_tokens_per_s: Spread
    one_death: str


def methods_over(count: int, facts: ModelFacts) -> list[Method]:
    """Every method on so many devices; experts on their own only where there are any."""
    pipeline = LayoutRequest(pipeline_parallel_size=count)
    copies = LayoutRequest(data_parallel_size=count)
    experts = LayoutRequest(tensor_parallel_size=count, enable_expert_parallel=True)
    return [
        Method("data parallel", copies),
        Method("layers over devices", pipeline, one_micro_batch=True),
        Method("pipeline parallel", pipeline),
        Method("tensor parallel", LayoutRequest(tensor_parallel_size=count)),
        *([Method("expert parallel", experts)] if facts.num_experts else []),
        Method("queue", copies, is_queue=True),
    ]


def measure_methods(settings: MethodsSettings, children: Children) -> Outcome:
    """Measure every method in turns, each in a fresh process. Raises InputError, EngineError."""
    children.expect(1)
    describe = DescribeJob(folder=settings.engine.model, dtype=settings.engine.dtype)
    facts = children.run("the model's facts", describe, DescribeResult).facts
    methods, skipped = _possible(settings, facts)
    jobs = {method.name: _job(settings, method) for method in methods}
    found = run_rounds(children, jobs, settings.num_runs)
    points = [_point(settings, facts, method, found[method.name]) for method in methods]
    return Outcome(
        name="methods",
        title=(
            f"{settings.model}: ways to use {settings.num_devices} devices, {settings.input_len} "
            f"in / {settings.output_len} out tokens"
        ),
        settings=settings,
        table=_table(points),
        notes=(
            *(f"not measured: {each.name}: {each.reason}" for each in skipped),
            "weights and KV cache: of the fullest device, in MB; replicas on the CPUs of one host "
            "share one copy of the weights",
            f"moved a step: computed from the layout, of a decode step of {settings.num_prompts} "
            "sequences; not measured",
            "first and per token: one request alone; output tokens/s: "
            f"{settings.num_prompts} prompts at once, but in a queue one for each device",
            "layers over devices: pipeline stages with one step at a time",
            f"a death, of any worker, in any of them: {ONE_DEATH}",
            f"medians (lowest..highest) of {settings.num_runs} rounds in turns, each method in a "
            "fresh process after a warm-up",
        ),
        results={"points": points, "skipped": skipped},
        runs=found,
        panels=_panels(points),
    )


def _possible(settings: MethodsSettings, facts: ModelFacts) -> tuple[list[Method], list[Skipped]]:
    methods, skipped = [], []
    for method in methods_over(settings.num_devices, facts):
        problem = why_not(method.layout, facts, settings.device, settings.num_devices)
        if problem:
            skipped.append(Skipped(method.name, problem))
        else:
            methods.append(method)
    if not methods:
        raise InputError(skipped[0].reason)
    return methods, skipped


def _job(settings: MethodsSettings, method: Method) -> EngineJob:
    count = settings.num_devices
    loads = (
        batch_load(1, settings.input_len, settings.output_len),
        Load(
            num_requests=settings.num_prompts,
            input_len=fixed(settings.input_len),
            output_len=fixed(settings.output_len),
            concurrency=count if method.is_queue else None,
        ),
    )
    return EngineJob(
        engine=placed(settings.engine, method.layout, settings.device, count),
        loads=loads,
        seed=settings.seed,
        num_cores=count if settings.device == "cpu" else None,
        one_micro_batch=method.one_micro_batch,
    )


def _point(
    settings: MethodsSettings,
    facts: ModelFacts,
    method: Method,
    results: Sequence[EngineResult],
) -> MethodPoint:
    plan = results[0].plan
    return MethodPoint(
        method=method.name,
        layout=plan.layout,
        weight_bytes=max(rank.weight_bytes for rank in plan.ranks),
        cache_bytes=max(rank.cache_bytes for rank in plan.ranks),
        step_bytes=_step_bytes(settings, facts, method),
        latency=latency_of(result.runs[0][0] for result in results),
        output_tokens_per_s=spread(result.runs[0][1].output_rate for result in results),
        one_death=ONE_DEATH,
    )


def _step_bytes(settings: MethodsSettings, facts: ModelFacts, method: Method) -> int | None:
    degrees = method.layout.degrees(settings.num_devices)
    if not method.layout.enable_expert_parallel:
        return decode_step_bytes(facts, degrees, settings.num_prompts)
    experts = experts_per_token(read_config(Path(settings.engine.model)))
    if experts is None:
        return None
    return decode_step_bytes(facts, degrees, settings.num_prompts, experts)


def experts_per_token(config: dict[str, Any]) -> int | None:
    """How many experts a token goes to, where the config says so by the usual name."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    found = next((each for part in parts if (each := part.get(_EXPERTS_PER_TOKEN))), None)
    return found if isinstance(found, int) else None


def _table(points: Sequence[MethodPoint]) -> Table:
    columns = ("method", "weights MB", "KV MB", "moved a step KB", "first token ms",
               "per token ms", "output tokens/s")  # fmt: skip
    rows = []
    for point in points:
        tpot = point.latency.tpot_s
        rows.append(
            (
                point.method,
                f"{point.weight_bytes / 1e6:,.1f}",
                f"{point.cache_bytes / 1e6:,.1f}",
                "-" if point.step_bytes is None else f"{point.step_bytes / 1e3:,.1f}",
                point.latency.ttft_s.text(1000),
                "-" if tpot is None else tpot.text(1000, 2),
                point.output_tokens_per_s.text(),
            )
        )
    return Table(columns, tuple(rows))


def _panels(points: Sequence[MethodPoint]) -> tuple[Panel, ...]:
    names = tuple(point.method for point in points)
    panels = [
        Panel(
            title="one request alone",
            y_label="time to first token, ms",
            kind="bars",
            names=names,
            series=(_bars("first token", [p.latency.ttft_s for p in points], 1000),),
        ),
        Panel(
            title="throughput",
            y_label="output tokens/s",
            kind="bars",
            names=names,
            series=(_bars("output tokens/s", [p.output_tokens_per_s for p in points], 1),),
        ),
        Panel(
            title="weights of the fullest device",
            y_label="MB",
            kind="bars",
            names=names,
            series=(Series(label="weights", y=tuple(p.weight_bytes / 1e6 for p in points)),),
        ),
    ]
    tpots = [tpot for point in points if (tpot := point.latency.tpot_s) is not None]
    if len(tpots) == len(points):
        own = Panel(
            title="one request alone",
            y_label="time per output token, ms",
            kind="bars",
            names=names,
            series=(_bars("per token", tpots, 1000),),
        )
        panels.insert(1, own)
    return tuple(panels)


def _bars(label: str, found: Sequence[Spread], scale: float) -> Series:
    return Series(
        label=label,
        y=tuple(each.median * scale for each in found),
        low=tuple(each.low * scale for each in found),
        high=tuple(each.high * scale for each in found),
    )
