"""Whether a grammar can be used, known before a request is admitted."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import msgspec

from spanwise.engine.grammar_process import TryGrammar, Verdict
from spanwise.errors import EngineError, InputError, ModelError, OverloadedError
from spanwise.runner.grammar import end_token_ids
from spanwise.types.sampling import Grammar
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.python_process import PythonProcess

MAX_GRAMMAR_BYTES = 128 << 10
_NAMES = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "lark": "the grammar",
}
_TRIAL_S = 2.5
_PATIENCE_S = 2.0  # with the grammars of others; with the trial less than five seconds
_START_S = 120.0  # transformers may have to be imported, on a busy machine
_NUM_REMEMBERED = 4096
_MAX_SAID = 200


def check_text(grammar: Grammar) -> None:
    """What can be said of a grammar at once. Raises InputError.

    It is not empty and not too large, and a JSON schema is JSON.
    """
    name = _NAMES.get(grammar.kind)
    if name is None:
        kinds = ", ".join(_NAMES)
        raise InputError(f"the kind of a grammar is one of {kinds}, got {grammar.kind!r:.80}")
    try:
        size = len(grammar.text.encode())
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has half a surrogate pair at character {error.start}; give valid Unicode"
        ) from error
    if not grammar.text.strip():
        raise InputError(f"{name} is empty; leave it out, or say what answers must match")
    if size > MAX_GRAMMAR_BYTES:
        raise InputError(f"{name} has {size} bytes, {MAX_GRAMMAR_BYTES} at most; make it smaller")
    if grammar.kind == "json_schema":
        _check_schema(grammar.text)


def _check_schema(text: str) -> None:
    try:
        schema = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise InputError(f"the JSON schema is not JSON: {error!s:.100}; mend it") from error
    except RecursionError as error:
        raise InputError("the JSON schema is nested too deeply; make it flatter") from error
    if not isinstance(schema, dict | bool):
        raise InputError("the JSON schema must be a JSON object; {} allows any JSON")


class GrammarChecker:
    """Tries grammars out in a process of its own, which starts with the first of them.

    For any number of threads; one grammar is tried at a time. What was found is remembered of the
    last few thousand grammars, by their hash. ``close`` ends the process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._lock = threading.Lock()
        self._trial: _Trial | None = None
        self._problems: OrderedDict[bytes, str] = OrderedDict()

    def check(self, grammar: Grammar, stop_token_ids: Sequence[int] = ()) -> None:
        """Return where the workers can follow the grammar with this model's tokens.

        ``stop_token_ids``: those of the request itself. Keeps the calling thread up to five
        seconds, longer only while the process starts; the thread waits and holds up no other.
        Raises InputError, and OverloadedError where the grammars of others take too long.
        """
        check_text(grammar)
        if not stop_token_ids and not end_token_ids(self._folder):
            raise InputError(
                "the model names no end token, so an answer that matches its grammar could not "
                "end; give stop_token_ids"
            )
        if not self._lock.acquire(timeout=_PATIENCE_S):
            raise OverloadedError("other grammars are being checked; try again", _TRIAL_S)
        try:
            problem = self._problem(grammar)
        finally:
            self._lock.release()
        if problem:
            name = _NAMES[grammar.kind]
            raise InputError(f"{name} cannot be used: {problem[:_MAX_SAID]}; change it")

    def close(self) -> None:
        """End the process, whatever it does. May be called again."""
        with self._lock:
            self._end_trial()

    def _problem(self, grammar: Grammar) -> str:
        key = sha256(msgspec.msgpack.encode(grammar)).digest()
        problem = self._problems.pop(key, None)
        if problem is None:
            problem = self._try(grammar)
        if problem is None:  # not remembered: on a busier machine than usual it may be wrong
            return "it is too complex, or its parts are nested too deeply"
        self._problems[key] = problem
        if len(self._problems) > _NUM_REMEMBERED:
            self._problems.popitem(last=False)
        return problem

    def _try(self, grammar: Grammar) -> str | None:
        """What a trial says; None for one without an end, whose process then makes way."""
        if self._trial is not None and not self._trial.is_alive():
            self._end_trial()  # somebody else has killed it: no fault of this grammar
        try:
            problem = self._asked(grammar)
        except ChannelClosed:
            problem = self._asked_again(grammar)
        except BaseException:
            self._end_trial()
            raise
        if problem is None:
            self._end_trial()
            self._trial = _Trial(self._folder)
        return problem

    def _asked(self, grammar: Grammar) -> str | None:
        trial = self._trial = self._trial or _Trial(self._folder)
        trial.wait_ready()
        return trial.ask(grammar)

    def _asked_again(self, grammar: Grammar) -> str | None:
        """In a new process: the last may have been dying when it was asked."""
        self._end_trial()
        try:
            return self._asked(grammar)
        except ChannelClosed:
            return None  # the grammar ends each of them
        except BaseException:
            self._end_trial()
            raise

    def _end_trial(self) -> None:
        if self._trial is not None:
            self._trial.end()
            self._trial = None


class _Trial:
    """The process in which grammars are tried."""

    def __init__(self, folder: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno()]
            self._process = PythonProcess("spanwise.engine.grammar_process", fds, [folder])
        self._channel: Channel[Verdict] = Channel(ours, Verdict)
        self._is_ready = False

    def is_alive(self) -> bool:
        """Whether its process still runs."""
        return self._process.is_alive()

    def wait_ready(self) -> None:
        """Raises ModelError where the model's tokenizer cannot be used with grammars."""
        if self._is_ready:
            return
        try:
            verdict = self._answer(_START_S)
        except ChannelClosed:
            verdict = None
        if verdict is None:
            raise EngineError("the process that checks grammars does not start; try again")
        if verdict.problem:
            raise ModelError(verdict.problem)
        self._is_ready = True

    def ask(self, grammar: Grammar) -> str | None:
        """What is wrong with a grammar; None where the process did not come to an answer.

        Raises ChannelClosed where it has ended.
        """
        self._channel.send(TryGrammar(grammar))
        verdict = self._answer(_TRIAL_S)
        return None if verdict is None else verdict.problem

    def end(self) -> None:
        """Kill the process."""
        self._channel.close()
        self._process.end(0.0)

    def _answer(self, timeout_s: float) -> Verdict | None:
        """The next answer; None when the time is up. Raises ChannelClosed."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
            for verdict, _ in self._channel.arrived():
                return verdict
        return None
