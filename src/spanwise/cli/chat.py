"""``spanwise chat``: a conversation with a model, on a server or in this process."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Group, Parameter

from spanwise.cli.answerer import Answerer
from spanwise.cli.client_key import client_key
from spanwise.cli.conversation import Conversation, Turn
from spanwise.cli.engine_flags import EngineFlags
from spanwise.cli.notes import Notes
from spanwise.cli.sampling_flags import SamplingFlags
from spanwise.cli.starting import start_llm
from spanwise.cli.typed_turns import TypedTurns
from spanwise.errors import EngineError, InputError, SpanwiseError
from spanwise.types.sampling import SamplingParams

_URL = re.compile(r"https?://", re.IGNORECASE)
_HELP = '''\
/reset           begin anew; the system message stays
/system TEXT     set the system message; without TEXT there is none
/regenerate      ask the last question again
/save FILE       write the conversation as a line that spanwise run --input takes
/help            show this
/quit            end, as Ctrl-D does
"""              begins and ends a message of several lines
Ctrl-C           stops an answer; at the prompt, twice, ends'''


@Parameter(name="*", group=Group("Sampling", sort_key=20))
@dataclass(frozen=True, kw_only=True)
class ChatSamplingFlags(SamplingFlags):
    """Those that make sense where one answer is shown as text."""

    max_tokens: Annotated[
        int | None, Parameter(help="Most tokens of an answer. Default: as many as fit.")
    ] = None
    n: Annotated[int | None, Parameter(parse=False)] = None
    logprobs: Annotated[int | None, Parameter(parse=False)] = None
    prompt_logprobs: Annotated[int | None, Parameter(parse=False)] = None


def chat(
    model_or_url: Annotated[
        str,
        Parameter(help="A model, as spanwise run takes it, or a server: http://localhost:8000."),
    ],
    /,
    *,
    model: Annotated[
        str | None, Parameter(help="With a server: which model. Default: its one model.")
    ] = None,
    api_key: Annotated[
        str | None, Parameter(help="With a server: its key. Default: $SPANWISE_API_KEY.")
    ] = None,
    system: Annotated[
        str | None,
        Parameter(help="The system message, before all others.", allow_leading_hyphen=True),
    ] = None,
    quiet: Annotated[bool, Parameter(negative="", help="Print nothing but the answers.")] = False,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 # frozen
    sampling: ChatSamplingFlags = ChatSamplingFlags(),  # frozen
) -> None:
    """Talk with a model: one on a server, or one started here."""
    notes, given = Notes(quiet), sampling.given()
    SamplingParams(**given)  # wrong values are refused before anything starts
    answerer: Answerer
    if _URL.match(model_or_url):
        if engine != EngineFlags():
            raise InputError("devices, layout and limits are the server's; leave their flags out")
        from spanwise.cli.answering_server import AnsweringServer

        answerer = AnsweringServer(model_or_url, model, client_key(api_key), given)
    else:
        if model is not None or api_key is not None:
            raise InputError("--model and --api-key go with a server's URL, not with a model")
        from spanwise.cli.answering_engine import AnsweringEngine

        answerer = AnsweringEngine(start_llm(model_or_url, engine.llm_arguments(), notes), given)
    try:
        _Chat(answerer, Conversation(system), notes).run()
    finally:
        answerer.close()


class _Chat:
    """The conversation's loop: what is typed, commands, answers."""

    def __init__(self, answerer: Answerer, conversation: Conversation, notes: Notes) -> None:
        self._answerer, self._conversation, self._notes = answerer, conversation, notes
        self._typed = TypedTurns()
        self._attempt = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._set_system,
            "/regenerate": self._regenerate,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self) -> None:
        """Answer until the end of the input. On a terminal an error ends only its turn."""
        if self._typed.is_interactive:
            self._notes.line("/help shows what there is beside talking; Ctrl-D ends")
        num_breaks = 0
        while num_breaks < 2:
            try:
                is_going_on = self._turn()
                num_breaks = 0
            except KeyboardInterrupt:
                num_breaks += 1
                self._notes.line("" if num_breaks > 1 else "\n(Ctrl-C once more, or Ctrl-D, ends)")
                continue
            except EngineError:
                raise
            except SpanwiseError as error:
                if not self._typed.is_interactive:
                    raise
                print(f"spanwise: {' '.join(str(error).split())}", file=sys.stderr)
                continue
            if not is_going_on:
                return
        sys.stdout.flush()
        signal.raise_signal(signal.SIGINT)  # ends the program as Ctrl-C does elsewhere

    def _turn(self) -> bool:
        """Read and do one thing; whether there may be more."""
        typed = self._typed.read()
        if typed is None:
            if self._typed.is_interactive:
                self._notes.line("")  # the shell's prompt begins its own line
            return False
        if not typed.is_quoted and typed.text.startswith("/"):
            return self._command(typed.text)
        if typed.text.strip():
            self._attempt = 0
            self._answer(typed.text)
        return True

    def _command(self, line: str) -> bool:
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name not in self._commands:
            raise InputError(f"there is no command {name:.80}; /help shows those there are")
        self._commands[name](rest.strip())
        return True

    def _answer(self, question: str, *, again: bool = False) -> None:
        messages = self._conversation.asking(question, again=again)
        reply = self._answerer.answer(messages, self._attempt)
        if reply.finish_reason is None:
            if reply.text and not reply.text.endswith("\n"):
                print(flush=True)
            self._notes.line("(stopped)")
            if not reply.text:
                return
        elif reply.finish_reason == "length":
            self._notes.line("(cut off: --max-tokens, or no more fits)")
        self._conversation.add(Turn(question, reply.text), again=again)

    # --- commands

    def _reset(self, rest: str) -> None:
        self._conversation.turns.clear()

    def _set_system(self, text: str) -> None:
        self._conversation.system = text or None

    def _regenerate(self, rest: str) -> None:
        if not self._conversation.turns:
            raise InputError("nothing has been asked yet")
        self._attempt += 1
        self._answer(self._conversation.turns[-1].question, again=True)

    def _save(self, name: str) -> None:
        if not name:
            raise InputError("/save wants the name of a file")
        record: dict[str, Any] = {"messages": self._conversation.messages()}
        try:
            Path(name).write_bytes(msgspec.json.encode(record) + b"\n")
        except OSError as error:
            raise InputError(f"{name:.200} cannot be written: {error.strerror}") from error

    def _help(self, rest: str) -> None:
        print(_HELP, file=sys.stderr)
