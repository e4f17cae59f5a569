"""What the command line says before any model is touched."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

_HEAVY = ("torch", "transformers", "huggingface_hub", "numpy", "tokenizers")
_PROBE = f"""
import os, sys
from spanwise.cli import main
leave = os._exit
def told(code):
    print([name for name in {_HEAVY!r} if name in sys.modules], file=sys.stderr)
    sys.stderr.flush()
    leave(code)
os._exit = told
main.main()
"""


def spanwise(*arguments: str, probe: bool = False) -> subprocess.CompletedProcess[str]:
    program = ["-c", _PROBE] if probe else ["-m", "spanwise"]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"COLUMNS": "80"},
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["devices", "--help"], ["--version"], []]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    answer = spanwise(*arguments, probe=True)
    assert answer.returncode == 0
    assert answer.stderr == "[]\n"
    assert answer.stdout.startswith(("Usage: spanwise", "spanwise 0."))


@pytest.mark.parametrize(
    ("arguments", "examples"),
    [
        (["--help"], 5),
        (["run", "--help"], 8),
        (["devices", "--help"], 2),
        (["serve", "--help"], 7),
        (["chat", "--help"], 3),
        (["bench", "serve", "--help"], 8),
    ],
)
def test_help_ends_with_examples_that_fit_the_line(arguments: list[str], examples: int) -> None:
    _, _, tail = spanwise(*arguments).stdout.partition("Examples:\n")
    indented = [line for line in tail.splitlines() if line.startswith("  ")]
    broken = [line for line in tail.splitlines() if line and line[0] not in " AsS"]
    assert len(indented) == examples and not broken


def test_help_is_quick() -> None:
    """Seconds of processor time: on a busy machine the clock says little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert spanwise("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_every_field_has_its_flag() -> None:
    from spanwise.types.sampling import SamplingParams

    text = spanwise("run", "--help").stdout
    fields = [*SamplingParams.__struct_fields__, "tensor_parallel_size", "pp_layers", "devices"]
    fields += ["json_schema", "regex"]  # other names of the field grammar
    assert [name for name in fields if f"--{name.replace('_', '-')}" not in text] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bogus"], "bogus"),
        (["run"], "MODEL"),
        (["run", "m"], "neither"),
        (["run", "m", "p", "--bogus"], "--bogus"),
        (["run", "m", "--bogus"], "--bogus"),
        (["run", "m", "p", "--max-tokens", "many"], "--max-tokens"),
        (["run", "m", "p", "--max-tokens", "-1"], "max_tokens must be a whole number from 1"),
        (["run", "m", "p", "--dtype", "int3"], "float32"),
        (["run", "m", "p", "--quantization", "int3"], "int8"),
        (["run", "m", "p", "--pp-layers", "5,x"], "--pp-layers"),
        (["run", "m", "p", "--kv-cache-memory", "2 apples"], "2GiB"),
        (["run", "m", "p", "--logit-bias", "{5"], "--logit-bias"),
        (["run", "m", "p", "--output", "o"], "--input"),
        (["run", "m", "p", "--json-schema", "{"], "the JSON schema is not JSON"),
        (["run", "m", "p", "--json-schema", "@no such file"], "--json-schema: no such file"),
        (["run", "m", "p", "--grammar", "@"], "--grammar: cannot be read"),
        (["run", "m", "p", "--regex", ""], "the regular expression is empty"),
        (["run", "m", "p", "--regex", "a", "--grammar", "start: /b/"], "regex and grammar"),
        (["run", "m", "\udcff"], "UTF-8"),
        (["run", "m", "--input", "no such file"], "no such file"),
        (["run", "./no such folder", "p"], "no model folder"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], said: str) -> None:
    answer = spanwise(*arguments)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("spanwise: ") and answer.stderr.count("\n") == 1
    assert said in answer.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPANWISE_DEBUG", "1")
    answer = spanwise("run", "m", "p", "--max-tokens", "-1")
    assert answer.returncode == 2
    assert "Traceback" in answer.stderr and "spanwise: max_tokens" in answer.stderr


def test_devices_name_the_cpu() -> None:
    rows = json.loads(spanwise("devices", "--json").stdout)
    assert rows[-1]["device"] == "cpu"
    assert rows[-1]["cores"] == len(os.sched_getaffinity(0))
    assert 0 < rows[-1]["free_bytes"] <= rows[-1]["memory_bytes"]
    assert "GiB" in spanwise("devices").stdout
