"""``spanwise bench scaling`` and ``methods``: they choose devices and layouts themselves."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from cyclopts import Parameter

from spanwise.cli.bench_flags import Model, ResultFlags, Runs, Seed, engine_for
from spanwise.cli.bench_progress import watching
from spanwise.cli.engine_flags import LimitFlags
from spanwise.cli.numbers import parse_whole_numbers
from spanwise.errors import InputError

Device = Literal["cpu", "cuda"]
LayoutName = Literal["dp", "tp", "pp"]
DeviceFlag = Annotated[
    Device | None, Parameter(help="Cores or cards. Default: cards where there are any.")
]
_WORKLOAD = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)
_LAYOUTS: tuple[LayoutName, ...] = ("dp", "tp", "pp")


def scaling(
    model: Model,
    /,
    *,
    devices: Annotated[str, Parameter(help="How many devices, rising.")] = "1,2,4",
    device: DeviceFlag = None,
    layouts: Annotated[str, Parameter(help="Ways to use them, of dp, tp and pp.")] = "dp,tp,pp",
    workloads: Annotated[
        str, Parameter(help="Tokens of a prompt / of its answer.")
    ] = "256/8,64/64",
    num_prompts: Annotated[int, Parameter(help="Prompts, all given at once.")] = 48,
    runs: Runs = 3,
    seed: Seed = 0,
    limits: LimitFlags = LimitFlags(),  # noqa: B008 # frozen
    results: ResultFlags = ResultFlags(),  # noqa: B008 # frozen
) -> None:
    """Measure what more devices bring: data, tensor and pipeline parallel."""
    from spanwise.bench.devices import default_device
    from spanwise.bench.scaling import ScalingSettings, Workload, measure_scaling
    from spanwise.bench.session import measure_and_save

    settings = ScalingSettings(
        model=model,
        device=device or default_device(),
        devices=tuple(parse_whole_numbers("--devices", [devices])),
        layouts=_layouts(layouts),
        workloads=tuple(Workload(*lengths) for lengths in _workloads(workloads)),
        engine=engine_for(model, limits.llm_arguments()),
        num_prompts=num_prompts,
        num_runs=runs,
        seed=seed,
    )
    with watching(results.quiet) as progress:
        measure_and_save(lambda each: measure_scaling(settings, each), results.output, progress)


def methods(
    model: Model,
    /,
    *,
    devices: Annotated[int, Parameter(help="How many devices.")] = 2,
    device: DeviceFlag = None,
    num_prompts: Annotated[int, Parameter(help="Prompts for the throughput.")] = 16,
    input_len: Annotated[int, Parameter(help="Tokens of every prompt.")] = 64,
    output_len: Annotated[int, Parameter(help="Tokens of every answer.")] = 64,
    runs: Runs = 3,
    seed: Seed = 0,
    limits: LimitFlags = LimitFlags(),  # noqa: B008 # frozen
    results: ResultFlags = ResultFlags(),  # noqa: B008 # frozen
) -> None:
    """Measure one model spread over the same devices in every way there is."""
    from spanwise.bench.devices import default_device
    from spanwise.bench.methods import MethodsSettings, measure_methods
    from spanwise.bench.session import measure_and_save

    settings = MethodsSettings(
        model=model,
        device=device or default_device(),
        engine=engine_for(model, limits.llm_arguments(), num_prompts),
        num_devices=devices,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        num_runs=runs,
        seed=seed,
    )
    with watching(results.quiet) as progress:
        measure_and_save(lambda each: measure_methods(settings, each), results.output, progress)


def _layouts(text: str) -> tuple[LayoutName, ...]:
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in _LAYOUTS]:
        raise InputError(f"--layouts must be some of dp,tp,pp, got {unknown[0]!r:.80}")
    return tuple(name for word in words for name in _LAYOUTS if name == word)


def _workloads(text: str) -> list[tuple[int, int]]:
    found = [_WORKLOAD.fullmatch(word.strip()) for word in text.split(",")]
    if not all(found):
        raise InputError(
            f"--workloads must be prompt/answer tokens such as 256/8,64/64, got {text!r:.80}"
        )
    return [(int(match[1]), int(match[2])) for match in found if match is not None]
