"""``spanwise run``: generate for one prompt, or for a file of prompts."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from spanwise.cli.engine_flags import EngineFlags
from spanwise.cli.notes import Notes, speed_line
from spanwise.cli.prompts_file import read_prompts
from spanwise.cli.results_file import results_file
from spanwise.cli.sampling_flags import SamplingFlags
from spanwise.cli.starting import start_llm
from spanwise.cli.text_stream import TextStream
from spanwise.errors import InputError
from spanwise.types.outputs import RequestOutput
from spanwise.types.sampling import SamplingParams

if TYPE_CHECKING:
    from spanwise.engine.llm import LLM

_LOOKS_LIKE_A_FLAG = re.compile(r"--?[a-zA-Z][\w-]*(=.*)?")


def run(
    model: Annotated[
        str, Parameter(help="A folder, spanwise/tiny-dense, spanwise/tiny-moe, or a hub name.")
    ],
    prompt: Annotated[
        str | None, Parameter(help="The text to go on from; - reads it.", allow_leading_hyphen=True)
    ] = None,
    /,
    *,
    chat: Annotated[
        bool, Parameter(negative="", help="Send the prompt as a user's message.")
    ] = False,
    input_name: Annotated[
        str | None, Parameter(name="--input", help="A file of prompts, one JSON object a line.")
    ] = None,
    output_name: Annotated[
        str | None, Parameter(name="--output", help="Where its results go. Default: printed.")
    ] = None,
    quiet: Annotated[bool, Parameter(negative="", help="Print nothing but the answers.")] = False,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 # frozen
    sampling: SamplingFlags = SamplingFlags(),  # noqa: B008 # frozen
) -> None:
    """Generate text for a prompt, or for every line of a file."""
    _check_sources(prompt, chat, input_name, output_name)
    runner = _Run(model, engine.llm_arguments(), Notes(quiet))
    if input_name is not None:
        runner.file(input_name, output_name, sampling.given())
        return
    assert prompt is not None
    text = _read_text() if prompt == "-" else prompt
    message = {"messages": [{"role": "user", "content": text}]}
    runner.prompt(message if chat else {"prompt": text}, SamplingParams(**sampling.given()))


def _check_sources(
    prompt: str | None, chat: bool, input_name: str | None, output_name: str | None
) -> None:
    if (prompt is None) == (input_name is None):
        said = "both" if prompt is not None else "neither"
        raise InputError(f"give a prompt (- reads it) or --input FILE, got {said}")
    if prompt is not None and prompt != "-" and _LOOKS_LIKE_A_FLAG.fullmatch(prompt):
        raise InputError(f"unknown option {prompt}; see spanwise run --help")
    if prompt is not None and not _is_text(prompt):
        raise InputError("the prompt is not valid UTF-8")
    if input_name is None and output_name is not None:
        raise InputError("--output goes with --input; redirect the text of a single prompt")
    if input_name is not None and chat:
        raise InputError('--chat goes with a prompt; write {"messages": ...} lines in the file')


def _is_text(argument: str) -> bool:
    """Whether an argument was decoded whole; bytes that could not be stand as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _read_text() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise InputError("the prompt on standard input is not UTF-8") from None


class _Run:
    """One run of one model."""

    def __init__(self, model: str, arguments: dict[str, Any], notes: Notes) -> None:
        self._model, self._arguments, self._notes = model, arguments, notes

    def prompt(self, prompt: dict[str, Any], params: SamplingParams) -> None:
        """Print the answer as it comes; several answers one after the other at the end."""
        with self._start() as llm:
            started = time.monotonic()
            stream = TextStream(params.stop_strings)
            for output in llm.stream(prompt, params):
                last = output
                if params.n == 1:
                    stream.show(output.outputs[0])
            if params.n > 1:
                _print_choices(last)
            self._notes.line(speed_line([last], time.monotonic() - started, llm.plan))

    def file(self, input_name: str, output_name: str | None, given: dict[str, Any]) -> None:
        """Answer every line of a file, in order."""
        jobs = read_prompts(input_name, given)
        with results_file(output_name) as write, self._start() as llm:
            started = time.monotonic()
            try:
                with self._notes.counting(len(jobs)) as count:
                    results = llm.generate(
                        [job.prompt for job in jobs], [job.params for job in jobs], on_output=count
                    )
            except InputError as error:
                raise type(error)(f"{input_name}: {error}") from error
            write(results)
            self._notes.line(speed_line(results, time.monotonic() - started, llm.plan))

    def _start(self) -> LLM:
        return start_llm(self._model, self._arguments, self._notes)


def _print_choices(output: RequestOutput) -> None:
    for choice in output.outputs:
        print(f"== answer {choice.index} ({choice.finish_reason})")
        print(choice.text, end="" if choice.text.endswith("\n") else "\n")
