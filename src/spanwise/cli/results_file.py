"""A file of results, one JSON object a line: whole, or not there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from spanwise.cli.stopping import undone_when_stopped
from spanwise.errors import InputError
from spanwise.types.outputs import CompletionOutput, RequestOutput
from spanwise.types.plan import TokenLogprobs

Write = Callable[[Iterable[RequestOutput]], None]


@contextmanager
def results_file(name: str | None) -> Iterator[Write]:
    """Open the place for results; None and ``-`` are standard output.

    A file is written under another name beside its own and renamed at the end of the block: after
    an error or a signal, what stood there before still stands. Raises InputError where nothing can
    be written.
    """
    path = Path(os.path.realpath(name)) if name not in (None, "-") else None
    if path is None:
        yield lambda results: _write(results, sys.stdout.buffer)
    elif path.exists() and not path.is_file():  # a pipe or a device cannot be replaced
        with _opened(path, "wb", path) as file:
            yield lambda results: _write(results, file)
    else:
        with _replacing(path) as file:
            yield lambda results: _write(results, file)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with undone_when_stopped(lambda: part.unlink(missing_ok=True)):
        try:
            with _opened(part, "xb", path) as file:
                yield file
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _opened(path: Path, mode: Literal["wb", "xb"], meant: Path) -> BinaryIO:
    try:
        return path.open(mode)
    except OSError as error:
        raise InputError(f"the output {meant} cannot be written: {error.strerror}") from error


def _write(results: Iterable[RequestOutput], file: BinaryIO) -> None:
    for index, result in enumerate(results):
        file.write(msgspec.json.encode(result_record(index, result)) + b"\n")


def result_record(index: int, result: RequestOutput) -> dict[str, Any]:
    """Give what stands on a result's line."""
    record: dict[str, Any] = {"index": index}
    if result.prompt is not None:
        record["prompt"] = result.prompt
    record["outputs"] = [_choice_record(choice) for choice in result.outputs]
    if result.prompt_logprobs is not None:
        record["prompt_logprobs"] = [_logprobs_record(each) for each in result.prompt_logprobs]
    num_prompt = len(result.prompt_token_ids)
    num_completion = sum(len(choice.token_ids) for choice in result.outputs)
    record["usage"] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }
    return record


def _choice_record(choice: CompletionOutput) -> dict[str, Any]:
    record = msgspec.structs.asdict(choice)
    del record["logprobs"]
    if choice.logprobs is not None:
        record["logprobs"] = [_logprobs_record(each) for each in choice.logprobs]
    return record


def _logprobs_record(logprobs: TokenLogprobs | None) -> dict[str, Any] | None:
    return None if logprobs is None else msgspec.structs.asdict(logprobs)
