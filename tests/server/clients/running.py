"""The server that client libraries talk to, and those in environments of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.support.server import DENSE, RealServer, serving

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[2]
_ENVIRONMENTS = _ROOT / ".venv-clients"
_PAGE = _ROOT / "docs" / "clients.md"
_SETUP = _ROOT / "scripts" / "_setup.py"
_TASKS = _HERE / "lm_eval_tasks"
_INSTALL_S = 900.0
_RUN_S = 300.0


@contextmanager
def serving_clients(*arguments: str) -> Iterator[RealServer]:
    """Serve on one core, with every process started that the server ever starts.

    On more, a small model waits for threads that other programs of the machine hold up.
    """
    one_core = ("--devices", f"cpu:{len(os.sched_getaffinity(0))}", "-dp", "1")
    with serving(*one_core, *arguments) as server:
        constrained = {"prompt": "1", "max_tokens": 1, "structured_outputs": {"regex": "a"}}
        server.complete(constrained).raise_for_status()
        yield server


def said_by(name: str, server: RealServer) -> dict[str, Any]:
    """What ``use_NAME.py`` found out about a server: its JSON, by question."""
    # -P: beside the script stand no modules that it wants.
    command = [str(python_of(name)), "-P", str(_HERE / f"use_{name}.py"), server.url, DENSE]
    answers: dict[str, Any] = json.loads(_output(command).splitlines()[-1])
    return answers


def example_says(library: str, server: RealServer, python: str | Path = sys.executable) -> str:
    """What the library's example in the docs prints, told of this server."""
    code = _example(library, "```python\n").replace("http://127.0.0.1:8000", server.url)
    # The tests forbid it the network, and huggingface_hub takes a port of this machine for that.
    return _output([str(python), "-P", "-c", code], HF_HUB_OFFLINE="0")


def command_says(library: str, server: RealServer, python: Path) -> str:
    """The same of an example that is a command, about the tasks that are here."""
    command = _example(library, "```\n").replace("http://127.0.0.1:8000", server.url)
    program, *words = shlex.split(command.replace("\\\n", ""))
    words[words.index("--include_path") + 1] = str(_TASKS)
    return _output([str(python.with_name(program)), *words])


@cache
def python_of(name: str) -> Path:
    """The interpreter of a client's environment, which is made where it is missing."""
    command = [sys.executable, str(_SETUP), "--client", name]
    made = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S)
    if made.returncode != 0:
        said = made.stderr.splitlines()
        reason = next((line for line in said if line.startswith("ERROR")), said[-1])
        pytest.fail(f"the environment of {name} cannot be made: {reason}", pytrace=False)
    return _ENVIRONMENTS / name / "bin" / "python"


def _example(library: str, fence: str) -> str:
    _, section = _PAGE.read_text().split(f"\n## {library}\n")
    return section.split("\n## ")[0].split(fence)[1].split("```")[0]


def _output(command: list[str], **environment: str) -> str:
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_RUN_S,
        cwd=_TASKS,  # where the tasks look for their examples
        env=os.environ | {"HF_HOME": str(_ENVIRONMENTS / "home")} | environment,
    )
    assert ran.returncode == 0, f"{shlex.join(command)} failed:\n{ran.stderr[-4000:]}"
    return ran.stdout
