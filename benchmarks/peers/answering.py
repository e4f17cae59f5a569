"""The child's side: an engine is made, and answers one job a line until its input ends.

Runs under the Python of each engine, so it uses the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

Options = dict[str, Any]
Job = dict[str, Any]
# Gives the number of tokens that came for each prompt.
Generate = Callable[[list[list[int]], int], list[int]]


def serve(
    start: Callable[[Options], AbstractContextManager[Callable[[Job], float]]], packages: list[str]
) -> None:
    """Answer jobs with seconds. ``start`` makes what answers; the core is chosen before.

    What libraries print goes to the log; the answers have the output to themselves.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options: Options = json.loads(sys.argv[1])
    os.sched_setaffinity(0, options["cores"])
    with start(options) as answer:
        answers.write(json.dumps({name: version(name) for name in packages}) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")


def generating(generate: Generate) -> Callable[[Job], float]:
    """Answers with the seconds of a generation, and makes sure that every token came."""

    def answer(job: Job) -> float:
        prompts, max_tokens = job["prompts"], job["max_tokens"]
        begin_s = time.perf_counter()
        counts = generate(prompts, max_tokens)
        elapsed_s = time.perf_counter() - begin_s
        assert counts == [max_tokens] * len(prompts), f"{max_tokens} tokens each wanted: {counts}"
        return elapsed_s

    return answer
