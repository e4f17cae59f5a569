"""One measurement in a process of its own: ``-m`` this module."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import msgspec

from spanwise.bench.job import (
    AttentionJob,
    Broken,
    DescribeJob,
    DescribeResult,
    EngineJob,
    Job,
    Reply,
    Result,
    StartJob,
    Told,
)
from spanwise.worker.failure import failure_of
from spanwise.worker.lifeline import hang_on


def main(reply_fd: int, lifeline_fd: int, job: Job) -> None:
    """Do the job, tell how it goes, and end with its result or with why there is none."""
    hang_on(lifeline_fd)
    replies = open(reply_fd, "wb")  # noqa: SIM115 # until the end

    def say(reply: Reply) -> None:
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()

    try:
        say(do(job, lambda line: say(Told(line))))
    except Exception as error:
        if os.environ.get("SPANWISE_DEBUG") == "1":
            sys.excepthook(type(error), error, error.__traceback__)
        failure = failure_of(error, "the measurement")
        say(Broken(failure.kind, failure.message))
    os._exit(0)  # taking torch down takes time, and everything else is closed


def do(job: Job, tell: Callable[[str], None]) -> Result:
    """Do a job in this process. Imports what it needs first then."""
    match job:
        case EngineJob():
            from spanwise.bench.engine_run import run_engine

            return run_engine(job, tell)
        case StartJob():
            from spanwise.bench.start_run import run_start

            return run_start(job, tell)
        case DescribeJob():
            from spanwise.model.facts import describe

            return DescribeResult(describe(job.folder, job.dtype))
        case AttentionJob():
            from spanwise.bench.attention_run import run_attention

            return run_attention(job)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), msgspec.json.decode(sys.argv[3], type=Job))
