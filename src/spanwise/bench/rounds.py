"""Several layouts or sizes measured in turns: A B C A B C, so that a drift meets all alike."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from spanwise.bench.children import Children
from spanwise.bench.job import EngineJob, EngineResult


def run_rounds(
    children: Children, jobs: Mapping[str, EngineJob], num_rounds: int
) -> dict[str, list[EngineResult]]:
    """Each job's results, one a round; within a round all jobs of one seed have the same prompts.

    A round's seed is the job's plus its number.
    """
    children.expect(num_rounds * len(jobs))
    found: dict[str, list[EngineResult]] = {name: [] for name in jobs}
    for number in range(num_rounds):
        for name, job in jobs.items():
            fresh = msgspec.structs.replace(job, seed=job.seed + number)
            label = f"{name}, round {number + 1} of {num_rounds}"
            found[name].append(children.run(label, fresh, EngineResult))
    return found
