"""`spanwise chat` as it is used: through a pipe and on a terminal, with a server and an engine."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tests.server.fake_openai import FakeOpenAI, serving

from spanwise.cli.ctrl_c import ends_answer

_TIMEOUT_S = 120.0  # the machine may be busy
_WORDS = "word0 word1 word2 word3 word4 "


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with serving(FakeOpenAI()) as running:
        yield running


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "spanwise", "chat", *arguments]


def piped(text: str | bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        timeout=_TIMEOUT_S,
        input=text if isinstance(text, bytes) else text.encode(),
    )


class Terminal:
    """The program on a terminal: what it shows, and keys."""

    def __init__(self, program: subprocess.Popen[bytes], terminal: int) -> None:
        self.program, self._terminal = program, terminal
        self.shown = ""

    def expect(self, text: str) -> str:
        """Read until the text is shown; give what was shown before it, and forget both."""
        deadline = time.monotonic() + _TIMEOUT_S
        while text not in self.shown:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._terminal], [], [], left)[0], self.shown
            self.shown += os.read(self._terminal, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def ctrl_c(self) -> None:
        self.program.send_signal(signal.SIGINT)

    def ctrl_c_at_prompt(self) -> None:
        """Once it waits: readline takes no signal between showing the prompt and waiting."""
        self.expect("> ")
        while psutil.Process(self.program.pid).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        self.ctrl_c()


@contextmanager
def on_terminal(*arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        command(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "dumb", "COLUMNS": "80"},
    )
    os.close(theirs)
    try:
        yield Terminal(program, ours)
    finally:
        program.kill()
        program.wait()
        os.close(ours)


# --- a server


def test_each_line_of_a_pipe_is_a_turn(server: FakeOpenAI, tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    lines = f'Hello\n\n"""two\nlines"""\n/save {saved}\n'
    flags = ("--system", "Be brief.", "--temperature", "0", "--seed", "5", "--stop", "x")
    answer = piped(lines, server.url, "--quiet", *flags)
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert answer.stdout.decode() == f"{_WORDS}\n{_WORDS}\n"
    first, second = server.bodies
    system = {"role": "system", "content": "Be brief."}
    hello = {"role": "user", "content": "Hello"}
    assert first["messages"] == [system, hello]
    assert second["messages"][1:3] == [hello, {"role": "assistant", "content": _WORDS}]
    assert second["messages"][3] == {"role": "user", "content": "two\nlines"}
    asked = {key: first[key] for key in first if key not in ("messages", "model")}
    assert asked == {"stream": True, "temperature": 0.0, "seed": 5, "stop": ["x"]}
    (line,) = saved.read_text().splitlines()
    assert json.loads(line)["messages"][:4] == second["messages"]


def test_commands(server: FakeOpenAI) -> None:
    lines = "One\n/regenerate\n/system Be kind.\nTwo\n/system\n/reset\nThree\n/help\n/quit\nFour\n"
    answer = piped(lines, f"{server.url}/v1", "--seed", "7", "--api-key", "secret")
    assert answer.returncode == 0 and b"/regenerate" in answer.stderr
    roles = ["".join(each["role"][0] for each in body["messages"]) for body in server.bodies]
    assert roles == ["u", "u", "suau", "u"]
    assert [body["seed"] for body in server.bodies] == [7, 8, 7, 7]
    assert server.keys == {"bearer secret"}


@pytest.mark.parametrize(
    ("lines", "arguments", "code", "said"),
    [
        (b"busy\n", (), 1, "the server says 429: too many requests"),
        (b"error\n", (), 1, "the server could not go on: the engine died"),
        (b"cut\n", (), 1, "broke off"),
        (b"/bogus\n", (), 2, "there is no command /bogus"),
        (b"/regenerate\n", (), 2, "nothing has been asked"),
        (b"/save /no/such/folder\n", (), 2, "cannot be written"),
        (b"\xff\n", (), 2, "not UTF-8"),
        (b'"""\n', (), 2, 'closing """'),
        (b"", ("-tp", "2"), 2, "are the server's"),
        (b"", ("--n", "2"), 2, "--n"),
        (b"", ("--temperature", "-1"), 2, "temperature"),
        (b"", ("--api-key", "a\nb"), 2, "API key"),
    ],
)
def test_what_cannot_be_is_one_line(
    server: FakeOpenAI, lines: bytes, arguments: tuple[str, ...], code: int, said: str
) -> None:
    answer = piped(lines, server.url, *arguments)
    stderr = answer.stderr.decode()
    assert answer.returncode == code
    assert stderr.startswith("spanwise: ") and stderr.count("\n") == 1 and said in stderr


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [
        ("http://127.0.0.1:1", 1, "cannot be reached"),
        ("http://", 2, "http://localhost:8000"),
        ("http://a:99999", 2, "http://localhost:8000"),
        ("./no such folder", 2, "no model folder"),
    ],
)
def test_what_is_not_there_is_one_line(place: str, code: int, said: str) -> None:
    answer = piped("", place)
    stderr = answer.stderr.decode()
    assert answer.returncode == code
    assert stderr.startswith("spanwise: ") and stderr.count("\n") == 1 and said in stderr


def test_ctrl_c_on_a_terminal(server: FakeOpenAI) -> None:
    """It stops an answer, clears a line, and twice at the prompt ends; errors do not end."""
    with on_terminal(server.url) as terminal:
        terminal.expect("Ctrl-D ends")
        terminal.expect("> ")
        terminal.type("endless\n")
        terminal.expect("word9 ")
        terminal.ctrl_c()
        terminal.expect("(stopped)")
        terminal.expect("> ")
        terminal.type("busy\n")
        terminal.expect("spanwise: the server says 429")
        terminal.expect("> ")
        terminal.type("Hello\n")
        terminal.expect("word4 ")
        terminal.ctrl_c_at_prompt()
        terminal.expect("Ctrl-C once more")
        terminal.ctrl_c_at_prompt()
        assert terminal.program.wait(_TIMEOUT_S) == 130
    assert server.num_broken_off == 1
    roles = [each["role"] for each in server.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user"], "the stopped answer stays, the error does not"


# --- an engine


def test_an_engine_answers_on_a_terminal() -> None:
    flags = ("--temperature", "0", "--ignore-eos", "--devices", "cpu:2", "-tp", "2")
    with on_terminal("spanwise/tiny-dense", *flags) as terminal:
        terminal.expect("plan: spanwise/tiny-dense")
        terminal.expect("> ")
        terminal.type("Hello\n")
        terminal.expect("Hello")
        terminal.expect("de")
        terminal.ctrl_c()
        assert len(terminal.expect("(stopped)")) < 5000
        terminal.expect("> ")
        terminal.type("/regenerate\n")
        terminal.expect("de")
        terminal.ctrl_c()
        terminal.expect("(stopped)")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.program.wait(_TIMEOUT_S) == 0


# --- Ctrl-C


def test_who_goes_on_pressing_ends_the_program(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    called: list[str] = []
    before = signal.signal(signal.SIGINT, lambda *_: called.append("program"))
    try:
        with ends_answer(lambda: called.append("answer")):
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
        assert called == ["answer", "program"]
        assert "once more ends the chat" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
        assert called == ["answer", "program", "program"], "what it meant before, it means again"
    finally:
        signal.signal(signal.SIGINT, before)
