"""The program as a user runs it: answers, files, refusals, and nothing left however it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

DENSE = "spanwise/tiny-dense"
_TIMEOUT_S = 240.0  # the machine may be busy
_GONE_S = 2.0
_ENDLESS = ("--max-tokens", "1900", "--ignore-eos", "--temperature", "0")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "spanwise", *arguments]


def spanwise(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=_TIMEOUT_S, input=text
    )


def answers(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- answers


@pytest.fixture(scope="module")
def printed() -> subprocess.CompletedProcess[str]:
    """One greedy answer on one device, the prompt from standard input."""
    arguments = ("run", DENSE, "-", "--dtype", "float32", "--max-tokens", "8", "--temperature", "0")
    return spanwise(*arguments, text="def main(")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, object]]]:
    """Standard error and the results of a file of prompts on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("results")
    lines = [
        '{"prompt": "import os", "max_tokens": 12, "n": 2, "seed": 3, "temperature": 1}',
        '{"prompt_token_ids": [5, 6, 7], "max_tokens": 3, "logprobs": 2}',
        '{"messages": [{"role": "user", "content": "Hello"}]}',
        '{"prompt": "def main("}',
    ]
    (folder / "in.jsonl").write_text("\n".join(lines))
    files = ("--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl"))
    sampling = ("--max-tokens", "8", "--temperature", "0", "--ignore-eos")
    answer = spanwise("run", DENSE, *files, "-tp", "2", "--dtype", "float32", *sampling)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "", "results went to the file"
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    return answer.stderr, answers(folder / "out.jsonl")


def test_a_prompt_is_answered(printed: subprocess.CompletedProcess[str]) -> None:
    assert printed.returncode == 0
    assert len(printed.stdout.strip()) > 3 and printed.stdout.endswith("\n")
    plan, done = printed.stderr.splitlines()
    assert plan.startswith(f"plan: {DENSE} (LlamaForCausalLM, float32): dp=1 x pp=1 x tp=1")
    assert "cpu:0 " in plan and " weights + " in plan
    assert "8 generated" in done and done.endswith("tokens/s per device")


def test_a_file_is_answered_in_order(results: tuple[str, list[dict[str, object]]]) -> None:
    stderr, lines = results
    plan, done = stderr.splitlines()
    assert "tp=2" in plan and "cpu:0, cpu:1 each" in plan and "on 2 devices" in done
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert [line.get("prompt") for line in lines] == ["import os", None, None, "def main("]
    counts = [[len(choice["token_ids"]) for choice in line["outputs"]] for line in lines]  # type: ignore[attr-defined]
    assert counts == [[12, 12], [3], [8], [8]]
    usage = lines[1]["usage"]
    assert usage == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_log_probabilities_come_where_asked(
    results: tuple[str, list[dict[str, object]]],
) -> None:
    with_logprobs = ["logprobs" in line["outputs"][0] for line in results[1]]  # type: ignore[index]
    assert with_logprobs == [False, True, False, False]
    logprobs = results[1][1]["outputs"][0]["logprobs"]  # type: ignore[index]
    assert [len(each["top_ids"]) for each in logprobs] == [2, 2, 2]


def test_one_device_and_two_give_the_same_text(
    printed: subprocess.CompletedProcess[str], results: tuple[str, list[dict[str, object]]]
) -> None:
    text = results[1][3]["outputs"][0]["text"]  # type: ignore[index]
    assert printed.stdout == (text if text.endswith("\n") else text + "\n")


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./no-such-folder"], "no model folder"),
        ([DENSE, "-pp", "40", "--devices", "cpu:40"], "layers"),
        ([DENSE, "-tp", "4", "--devices", "cpu:2"], "devices"),
        ([DENSE, "-tp", "2", "--enable-expert-parallel"], "expert"),
        ([DENSE, "--devices", "cuda:99"], "cuda:99"),
        ([DENSE, "--max-tokens", "-5"], "max_tokens"),
        ([DENSE, "--stop-token-ids", "9999999"], "9999999"),
        ([DENSE, "--max-model-len", "8"], "8"),
    ],
    ids=lambda value: " ".join(value[1:]) or "folder" if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str) -> None:
    prompt = "def main(self, one, two, three, four, five, six):"
    refused(spanwise("run", *arguments[:1], prompt, *arguments[1:]), said)


def test_a_broken_line_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    files = ("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    answer = spanwise("run", DENSE, *files)
    refused(answer, "in.jsonl line 2")
    assert "plan:" not in answer.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_token_out_of_range_leaves_the_old_results(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt_token_ids": [4, 9999999]}\n')
    (tmp_path / "out.jsonl").write_text("old")
    files = ("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    refused(spanwise("run", DENSE, *files, "--quiet"), "in.jsonl: prompt 1: .*9999999")
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def refused(answer: subprocess.CompletedProcess[str], said: str) -> None:
    """Exit code 2 and one line, after the plan where the start had come so far."""
    lines = [line for line in answer.stderr.splitlines() if not line.startswith("plan: ")]
    assert (answer.returncode, answer.stdout, len(lines)) == (2, "", 1), answer
    assert lines[0].startswith("spanwise: ")
    assert re.search(said, lines[0]), lines[0]


# --- endings


@contextmanager
def generating(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """The program and its processes, once it prints text."""
    popen = subprocess.Popen(
        command("run", DENSE, "def main(", *_ENDLESS, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert popen.stdout is not None and popen.stderr is not None
    try:
        assert popen.stdout.read(1), popen.stderr.read().decode()
        yield popen, psutil.Process(popen.pid).children(recursive=True)
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()
        popen.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_everything(number: signal.Signals) -> None:
    with generating("-tp", "2") as (popen, children):
        assert len(children) >= 3, "fork server, zygotes, workers"
        popen.send_signal(number)
        deadline = time.monotonic() + _GONE_S
        code = popen.wait(_GONE_S)
        left = [process for process in children if not gone(process, deadline)]
        assert left == []
        assert popen.stderr is not None
        assert b"Traceback" not in popen.stderr.read()
        assert code == (-number if number == signal.SIGKILL else 128 + number)


def gone(process: psutil.Process, deadline: float) -> bool:
    """Whether a process ends in time; one that only waits to be reaped has ended."""
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_reader_who_leaves_ends_it_quietly() -> None:
    with generating() as (popen, _):
        assert popen.stdout is not None and popen.stderr is not None
        popen.stdout.close()
        assert popen.wait(_TIMEOUT_S) == 128 + signal.SIGPIPE
        assert popen.stderr.read().startswith(b"plan: ")
