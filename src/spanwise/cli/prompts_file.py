"""A file of prompts, one JSON object a line, read whole before any model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from spanwise.cli.grammar_fields import FIELDS, one_grammar
from spanwise.errors import InputError
from spanwise.types.sampling import SamplingParams

_PROMPTS = ("prompt", "prompt_token_ids", "messages")


class Job(NamedTuple):
    """One prompt, as ``LLM.generate`` takes it, and how to sample it."""

    prompt: dict[str, Any]
    params: SamplingParams


class _Line(SamplingParams, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line: one of the prompts, and sampling fields beside it."""

    prompt: str | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    messages: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET

    def job(self) -> Job:
        given = {name: getattr(self, name) for name in _PROMPTS}
        given = {name: value for name, value in given.items() if value is not msgspec.UNSET}
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise InputError(f"a line has exactly one of {', '.join(_PROMPTS)}; this has {said}")
        if isinstance(self.messages, list) and not _have_roles(self.messages):
            raise InputError('messages must be a non-empty list of {"role": ..., "content": ...}')
        fields = {name: getattr(self, name) for name in SamplingParams.__struct_fields__}
        return Job(given, SamplingParams(**fields))


def _have_roles(messages: list[dict[str, Any]]) -> bool:
    return bool(messages) and all(isinstance(each.get("role"), str) for each in messages)


def read_prompts(name: str, defaults: Mapping[str, Any]) -> list[Job]:
    """Read the prompts of a file, ``-`` for standard input; a line's own fields come first.

    Empty lines are passed over. Raises InputError with file and line number of what is wrong.
    """
    lines = _read(name).split(b"\n")
    jobs = [
        _job(f"{name} line {number}", line, defaults)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not jobs:
        raise InputError(f'{name} holds no prompts; write {{"prompt": "text"}} on each line')
    return jobs


def _read(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"the input {name} cannot be read: {error.strerror}") from error


def _job(where: str, line: bytes, defaults: Mapping[str, Any]) -> Job:
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
        others = {name: value for name, value in defaults.items() if name != "grammar"}
        own = {name: fields.pop(name) for name in FIELDS if name in fields}
        grammar = one_grammar(own) if own else defaults.get("grammar")
        job = msgspec.convert({**others, **fields}, _Line, str_keys=True).job()
        return job._replace(params=msgspec.structs.replace(job.params, grammar=grammar))
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {error}; spanwise run --help shows what a line is") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{where}: broken JSON ({error}); write one object a line, in UTF-8"
        ) from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
