"""One start of an ``LLM`` in this process, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable

from spanwise.bench.job import Moment, StartJob, StartResult

# What the engine tells when a phase begins; the phase before it lasts until then.
_PHASES = {"loading weights": "weights", "starting workers": "workers"}


def run_start(job: StartJob, tell: Callable[[str], None]) -> StartResult:
    """Start, and draw one token. Raises InputError or EngineError."""
    from spanwise.engine.llm import LLM
    from spanwise.types.sampling import SamplingParams

    phases = [Moment("config", time.monotonic())]

    def progress(line: str) -> None:
        if line in _PHASES:
            phases.append(Moment(_PHASES[line], time.monotonic()))
        tell(line)

    prompt = {"prompt_token_ids": [1 + number % 8 for number in range(job.input_len)]}
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    with LLM(job.model, **job.arguments, progress=progress) as llm:
        phases.append(Moment("first token", time.monotonic()))
        llm.generate(prompt, params)
        first_token_at_s = time.monotonic()
        return StartResult(plan=llm.plan, phases=tuple(phases), first_token_at_s=first_token_at_s)
