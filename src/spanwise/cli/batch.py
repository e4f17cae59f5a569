"""``spanwise batch``: a job over many items, which goes on where it was ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from spanwise.cli.engine_flags import EngineFlags
from spanwise.cli.notes import Notes, plan_line
from spanwise.cli.sampling_flags import SamplingFlags
from spanwise.cli.starting import silence_libraries
from spanwise.errors import InputError

if TYPE_CHECKING:
    from spanwise.jobs.batch import Batch
    from spanwise.jobs.results import Results

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def batch(
    model: Annotated[
        str, Parameter(help="A folder, a spanwise/ name, a hub name, or module:factory.")
    ],
    /,
    *,
    input_name: Annotated[
        str,
        Parameter(
            name="--input",
            help="A .jsonl file of OpenAI batch requests; a folder of images or audio; a .csv or "
            ".parquet file.",
        ),
    ],
    output_name: Annotated[
        str,
        Parameter(
            name="--output",
            allow_leading_hyphen=True,
            help="Where results go, one JSON object a line.",
        ),
    ],
    column: Annotated[
        tuple[str, ...],
        Parameter(negative="", show_default=False, help="A column of the table. May be repeated."),
    ] = (),
    restart: Annotated[
        bool, Parameter(negative="", help="Begin anew; what is in the output is lost.")
    ] = False,
    max_batch_size: Annotated[
        int | None, Parameter(help="Items computed at once; not for text. Default: 32.")
    ] = None,
    max_audio_s: Annotated[
        float, Parameter(help="Audio that is longer goes to the error file.")
    ] = 300.0,
    quiet: Annotated[bool, Parameter(negative="", help="Say nothing but errors.")] = False,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 # frozen
    sampling: SamplingFlags = SamplingFlags(),  # noqa: B008 # frozen
) -> None:
    """Run every item of an input through a model, each once; run it again to go on."""
    arguments, given = engine.llm_arguments(), sampling.given()
    if output_name == "-":
        raise InputError("--output must be a file, so that the job can go on where it was ended")
    if max_batch_size is not None and max_batch_size < 1:
        raise InputError(f"--max-batch-size must be 1 or more, got {max_batch_size}")
    silence_libraries()
    from spanwise.jobs.batch import BatchOptions, open_batch
    from spanwise.jobs.results import Results

    options = BatchOptions(
        model=model,
        input=Path(input_name),
        columns=column,
        engine=arguments,
        sampling=given,
        max_batch_size=max_batch_size,
        max_audio_s=max_audio_s,
    )
    output = Path(output_name)
    if output.exists() and options.input.exists() and output.samefile(options.input):
        raise InputError(f"--input and --output are both {output}; give another --output")
    job = open_batch(options)
    with closing(Results(output, job.identity, restart=restart)) as results:
        stopped_by = _work(job, results, Notes(quiet), quiet)
    if stopped_by is not None:
        signal.raise_signal(stopped_by)  # ends the program as it would have ended at once


def _work(job: Batch, results: Results, notes: Notes, quiet: bool) -> int | None:
    """Do what is not done; give the signal that ended it early."""
    from spanwise.cli.batch_progress import watched
    from spanwise.jobs.job import Job

    num_items, before = job.extent.num_items, results.num_done
    if results.written.next_index == num_items:
        notes.line(f"nothing is left to do: {_outcome(results)}")
        return None
    if before:
        notes.line(f"going on: {before:,} of {num_items:,} items are done")
    with ExitStack() as stack:
        with notes.starting() as progress:
            started = stack.enter_context(job.started(progress))
        notes.line(plan_line(started.plan))
        began_s = time.monotonic()
        with watched(quiet) as told, _asked_to_stop() as signals:
            reached = Job(
                job.source,
                num_items,
                started.task,
                results,
                told=told,
                stopped=lambda: bool(signals),
                num_threads=job.num_threads,
            ).run()
    if reached.num_done < num_items:
        done = f"{reached.num_done:,} of {num_items:,} items are done"
        notes.line(f"stopped: {done}; run the same command again to go on")
        return signals[0]
    elapsed_s = time.monotonic() - began_s
    rate = (num_items - before) / max(elapsed_s, 1e-9)
    notes.line(f"done: {_outcome(results)}, in {elapsed_s:.2f} s: {rate:.1f} items/s")
    return None


def _outcome(results: Results) -> str:
    """How many items stand where."""
    num_errors = results.written.num_errors
    good = f"{results.written.next_index - num_errors:,} items in {results.output}"
    return good + (f", {num_errors:,} errors in {results.errors}" if num_errors else "")


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """In this block the first Ctrl-C or SIGTERM is only noted, the second ends the program."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            end = before[signal.Signals(number)]
            assert callable(end)
            end(number, frame)
        noted.append(number)

    for number, handler in before.items():
        if callable(handler):  # nohup's wish, and what else is ignored, stays
            signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
