"""``spanwise bench throughput``: how much an engine does when all is there at once."""

from __future__ import annotations

import msgspec

from spanwise.bench.children import Children
from spanwise.bench.job import EngineJob, EngineResult, Load
from spanwise.bench.latency import per_run
from spanwise.bench.lengths import Lengths
from spanwise.bench.numbers import at_least
from spanwise.bench.outcome import Outcome, Table
from spanwise.bench.spread import Spread, spread
from spanwise.engine.config import EngineConfig


class ThroughputSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts and answers of these lengths, all prompts given at once."""

    model: str
    engine: EngineConfig
    num_prompts: int
    input_len: Lengths
    output_len: Lengths
    num_runs: int
    seed: int

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        at_least("num_prompts", self.num_prompts, 1)
        at_least("runs", self.num_runs, 1)


def measure_throughput(settings: ThroughputSettings, children: Children) -> Outcome:
    """Measure all runs in one fresh process, after a warm-up. Raises InputError, EngineError."""
    children.expect(1)
    load = Load(
        num_requests=settings.num_prompts,
        input_len=settings.input_len,
        output_len=settings.output_len,
    )
    job = EngineJob(
        engine=settings.engine, loads=(load,), num_runs=settings.num_runs, seed=settings.seed
    )
    found = children.run("throughput", job, EngineResult)
    runs = [loads[0] for loads in found.runs]
    rates: dict[str, Spread] = {
        "requests/s": spread(run.request_rate for run in runs),
        "input tokens/s": spread(run.input_rate for run in runs),
        "output tokens/s": spread(run.output_rate for run in runs),
    }
    rows = tuple(
        (name, *(f"{number:,.2f}" for number in (rate.median, rate.low, rate.high)))
        for name, rate in rates.items()
    )
    return Outcome(
        name="throughput",
        title=(
            f"{settings.model}: throughput, {settings.num_prompts} prompts at once; "
            f"{found.plan.layout}"
        ),
        settings=settings,
        table=Table(("a second", "median", "min", "max"), rows),
        notes=(
            f"{settings.num_runs} runs in one process after a warm-up, from the first prompt given "
            "to the last token; no tokenizer takes part",
        ),
        results={
            "plan": found.plan,
            "requests_per_s": rates["requests/s"],
            "input_tokens_per_s": rates["input tokens/s"],
            "output_tokens_per_s": rates["output tokens/s"],
        },
        runs=found.runs,
        panels=(
            per_run("requests", "requests/s", [run.request_rate for run in runs]),
            per_run("input", "tokens/s", [run.input_rate for run in runs]),
            per_run("output", "tokens/s", [run.output_rate for run in runs]),
        ),
    )
