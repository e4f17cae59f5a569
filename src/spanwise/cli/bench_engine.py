"""``spanwise bench latency``, ``throughput``, ``startup`` and ``batch``: one engine, any layout."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from spanwise.cli.bench_flags import Model, ResultFlags, Runs, Seed, engine_for
from spanwise.cli.bench_progress import watching
from spanwise.cli.engine_flags import EngineFlags
from spanwise.cli.numbers import parse_whole_numbers

InputLen = Annotated[int, Parameter(help="Tokens of every prompt.")]
OutputLen = Annotated[int, Parameter(help="Tokens of every answer.")]


def latency(
    model: Model,
    /,
    *,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    batch_size: Annotated[int, Parameter(help="Prompts that run together.")] = 1,
    runs: Runs = 5,
    seed: Seed = 0,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 # frozen
    results: ResultFlags = ResultFlags(),  # noqa: B008 # frozen
) -> None:
    """Measure time to first token, time per output token and end to end of one batch."""
    from spanwise.bench.latency import LatencySettings, measure_latency
    from spanwise.bench.session import measure_and_save

    settings = LatencySettings(
        model=model,
        engine=engine_for(model, engine.llm_arguments(), batch_size),
        input_len=input_len,
        output_len=output_len,
        batch_size=batch_size,
        num_runs=runs,
        seed=seed,
    )
    with watching(results.quiet) as progress:
        measure_and_save(lambda each: measure_latency(settings, each), results.output, progress)


def throughput(
    model: Model,
    /,
    *,
    num_prompts: Annotated[int, Parameter(help="Prompts, all given at once.")] = 100,
    input_len: Annotated[
        str, Parameter(help="Tokens of a prompt: 128, 32:256 or a mix, 32@3,512@1.")
    ] = "128",
    output_len: Annotated[str, Parameter(help="Tokens of an answer, in the same form.")] = "64",
    runs: Runs = 3,
    seed: Seed = 0,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 # frozen
    results: ResultFlags = ResultFlags(),  # noqa: B008 # frozen
) -> None:
    """Measure requests and tokens a second with all prompts given at once."""
    from spanwise.bench.lengths import parse_lengths
    from spanwise.bench.session import measure_and_save
    from spanwise.bench.throughput import ThroughputSettings, measure_throughput

    settings = ThroughputSettings(
        model=model,
        input_len=parse_lengths("--input-len", input_len),
        output_len=parse_lengths("--output-len", output_len),
        engine=engine_for(model, engine.llm_arguments()),
        num_prompts=num_prompts,
        num_runs=runs,
        seed=seed,
    )
    with watching(results.quiet) as progress:
        measure_and_save(lambda each: measure_throughput(settings, each), results.output, progress)


def startup(
    model: Model,
    /,
    *,
    input_len: InputLen = 8,
    runs: Runs = 3,
    cold: Annotated[
        bool, Parameter(negative="", help="Drop the weights from the page cache before each run.")
    ] = False,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 # frozen
    results: ResultFlags = ResultFlags(),  # noqa: B008 # frozen
) -> None:
    """Measure the time from a process's start to its first token, phase by phase."""
    from spanwise.bench.session import measure_and_save
    from spanwise.bench.startup import StartupSettings, measure_startup

    arguments = engine.llm_arguments()
    settings = StartupSettings(
        model=model,
        folder=engine_for(model, arguments).model,
        arguments=arguments,
        input_len=input_len,
        num_runs=runs,
        is_cold=cold,
    )
    with watching(results.quiet) as progress:
        measure_and_save(lambda each: measure_startup(settings, each), results.output, progress)


def batch(
    model: Model,
    /,
    *,
    batch_sizes: Annotated[str, Parameter(help="Sizes to measure, rising.")] = "1,2,4,8,16,32",
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    runs: Runs = 3,
    seed: Seed = 0,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 # frozen
    results: ResultFlags = ResultFlags(),  # noqa: B008 # frozen
) -> None:
    """Measure throughput and latency against the batch size."""
    from spanwise.bench.batch import BatchSettings, measure_batch
    from spanwise.bench.session import measure_and_save

    sizes = tuple(parse_whole_numbers("--batch-sizes", [batch_sizes]))
    settings = BatchSettings(
        model=model,
        engine=engine_for(model, engine.llm_arguments(), max(sizes)),
        batch_sizes=sizes,
        input_len=input_len,
        output_len=output_len,
        num_runs=runs,
        seed=seed,
    )
    with watching(results.quiet) as progress:
        measure_and_save(lambda each: measure_batch(settings, each), results.output, progress)
