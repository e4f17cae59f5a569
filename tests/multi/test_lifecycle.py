"""However an LLM ends, or fails, nothing of it is left; and what should go on goes on."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import psutil
import pytest

from spanwise import LLM, SamplingParams
from spanwise.embedded import EMBEDDED
from spanwise.errors import EngineError, ModelError, WorkerError
from spanwise.worker.supervisor import Supervisor

DENSE = "spanwise/tiny-dense"
PROMPT = "def main("
OTHER = "import os"
SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=1900, temperature=0.0, ignore_eos=True)
TP2: dict[str, Any] = {"devices": "cpu:2", "tensor_parallel_size": 2}
DP2: dict[str, Any] = {"devices": "cpu:2", "data_parallel_size": 2}
LIMITS: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 32 << 20}
_GONE_S = 2.0

# Two LLMs below one supervisor, so that their processes come from one fork server.
SCRIPT = """
import sys
from spanwise import LLM, SamplingParams
from spanwise.worker.supervisor import Supervisor

supervisor = Supervisor()
options = {"devices": "cpu:2", "dtype": "float32", "kv_cache_memory": 32 << 20}
prompt = {"prompt_token_ids": [5, 6, 7]}
params = SamplingParams(max_tokens=1900, temperature=0.0, ignore_eos=True)
llms = [
    LLM("spanwise/tiny-dense", supervisor=supervisor, tensor_parallel_size=2, **options),
    LLM("spanwise/tiny-dense", supervisor=supervisor, data_parallel_size=2, **options),
]
for llm in llms:
    next(llm.stream(prompt, params))
if sys.argv[1] == "idle":
    print("ready", flush=True)
    sys.stdin.read()
while True:
    for _ in zip(*(llm.stream(prompt, params) for llm in llms)):
        print("ready", flush=True)
"""
# Forgets to shut down, on a fork server of its own.
FORGETFUL = """
import psutil
from spanwise import LLM, SamplingParams

llm = LLM("spanwise/tiny-dense", devices="cpu:2", tensor_parallel_size=2, kv_cache_memory=32 << 20)
llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=2))
print(*(child.pid for child in psutil.Process().children(recursive=True)))
"""


def start(supervisor: Supervisor | None = None, **options: Any) -> LLM:
    return LLM(DENSE, supervisor=supervisor, **LIMITS | options)


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate([PROMPT, OTHER], SHORT)]


@contextmanager
def nothing_new(supervisor: Supervisor) -> Iterator[set[int]]:
    """Fail if the block leaves processes below the supervisor; gives those there were."""
    before = set(supervisor.pids())
    yield before
    assert set(supervisor.pids()) == before


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def all_gone(processes: list[psutil.Process], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(map(is_alive, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def shared_names(process: psutil.Process) -> list[str]:
    """Mapped files that would stay in /dev/shm after the process."""
    paths = [region.path for region in process.memory_maps()]
    return [path for path in paths if path.startswith("/dev/shm")]


def public_sockets(process: psutil.Process) -> list[Any]:
    """Sockets that anybody else could connect to: all but unix ones without a name."""
    return [found for found in process.net_connections(kind="all") if found.laddr]


# --- the process that made the LLM is killed


@pytest.mark.parametrize("phase", ["idle", "generating"])
def test_nothing_survives_the_process_of_the_llm(phase: str) -> None:
    command = [sys.executable, "-c", SCRIPT, phase]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "ready\n"
        below = psutil.Process(script.pid).children(recursive=True)
        # The fork server; tp=2: two zygotes, two workers; dp=2: one zygote, two workers.
        assert len(below) == 1 + 4 + 3
        everyone = [psutil.Process(script.pid), *below]
        assert [name for process in everyone for name in shared_names(process)] == []
        assert [found for process in everyone for found in public_sockets(process)] == []
        script.kill()
        assert all_gone(below, _GONE_S)


# --- ends on purpose, or forgotten


def test_a_script_that_forgets_to_shut_down_leaves_nothing_and_says_nothing() -> None:
    command = [sys.executable, "-c", FORGETFUL]
    script = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (script.returncode, script.stderr) == (0, "")
    pids = [int(pid) for pid in script.stdout.split()]
    assert len(pids) == 1 + 2 + 2
    assert not any(map(psutil.pid_exists, pids))


def test_shutting_down_twice_is_once_and_nothing_works_after(supervisor: Supervisor) -> None:
    with nothing_new(supervisor):
        llm = start(supervisor, **TP2)
        open_stream = llm.stream(PROMPT, ENDLESS)
        next(open_stream)
        llm.shutdown()
        llm.shutdown()
    for use in (lambda: llm.generate(PROMPT), lambda: next(llm.stream(PROMPT))):
        with pytest.raises(EngineError, match=r"^this LLM is shut down; make a new one$"):
            use()
    with pytest.raises(EngineError, match=r"^this LLM is shut down; make a new one$"):
        next(open_stream)


def test_an_exception_in_the_block_ends_the_llm(supervisor: Supervisor) -> None:
    with nothing_new(supervisor) as before:
        with pytest.raises(ZeroDivisionError), start(supervisor, **DP2) as llm:
            assert set(supervisor.pids()) > before
            next(llm.stream(PROMPT, ENDLESS))
            raise ZeroDivisionError
        with pytest.raises(EngineError, match=r"^this LLM is shut down"):
            llm.generate(PROMPT)


def test_a_forgotten_llm_is_closed(supervisor: Supervisor) -> None:
    with nothing_new(supervisor) as before:
        llm = start(supervisor, **TP2)
        tokens(llm)
        assert len(set(supervisor.pids()) - before) == 4
        del llm
        gc.collect()


def test_a_fork_of_the_llms_process_closes_nothing(supervisor: Supervisor) -> None:
    with start(supervisor, **TP2) as llm:
        right = tokens(llm)
        child = os.fork()
        if child == 0:
            llm.shutdown()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert tokens(llm) == right


# --- streams


def test_a_stream_left_early_costs_the_others_nothing(supervisor: Supervisor) -> None:
    with start(supervisor, **DP2) as llm:
        right = tokens(llm)
        for left_after in (1, 3):
            list(islice(llm.stream(PROMPT, ENDLESS), left_after))
            assert tokens(llm) == right


def test_streams_read_in_turns_do_not_take_one_anothers_news(supervisor: Supervisor) -> None:
    with start(supervisor, **TP2) as llm:
        right = tokens(llm)
        forgotten = llm.stream(PROMPT, ENDLESS)
        next(forgotten)
        going = [llm.stream(PROMPT, SHORT), llm.stream(OTHER, SHORT)]
        last = [output for turn in zip_longest(*going) for output in turn if output is not None]
        ended = {output.prompt: output.outputs[0].token_ids for output in last if output.finished}
        assert [ended[PROMPT], ended[OTHER]] == right
        assert tokens(llm) == right
        assert len(next(forgotten).outputs[0].token_ids) > 1


# --- failures


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A model whose weights are cut short."""
    folder = tmp_path / "broken"
    shutil.copytree(EMBEDDED[DENSE], folder)
    os.truncate(folder / "model.safetensors", 1 << 20)
    return folder


def test_a_start_that_fails_leaves_nothing(broken: Path, supervisor: Supervisor) -> None:
    children = set(psutil.Process().children())
    with nothing_new(supervisor):
        for shared in (supervisor, None):
            with pytest.raises(ModelError, match=r"model.safetensors is truncated or damaged: "):
                LLM(str(broken), supervisor=shared, **TP2)
    assert set(psutil.Process().children()) == children


def test_a_killed_worker_is_named_and_the_rest_cleared_away(supervisor: Supervisor) -> None:
    with nothing_new(supervisor) as before:
        llm = start(supervisor, **TP2)
        last_worker = [pid for pid in supervisor.pids() if pid not in before][-1]
        stream = llm.stream(PROMPT, ENDLESS)
        next(stream)
        os.kill(last_worker, signal.SIGKILL)
        text = r"^worker dp0/pp0/tp1 on cpu:1 died from signal 9 in step \d+$"
        with pytest.raises(WorkerError, match=text):
            list(stream)
        llm.shutdown()
        with pytest.raises(EngineError, match=r"^this LLM is shut down"):
            llm.generate(PROMPT)
    with start(supervisor, **TP2) as llm:  # the fork server is none the worse
        assert len(tokens(llm)) == 2


# --- several at once


def test_two_llms_of_one_supervisor_share_the_weights(supervisor: Supervisor) -> None:
    with nothing_new(supervisor) as before:
        first = start(supervisor, devices="cpu:1")
        alone = set(supervisor.pids()) - before
        second = start(supervisor, **DP2)
        assert len(alone) == 2  # a zygote and a worker
        assert len(set(supervisor.pids()) - before - alone) == 2  # two workers, no zygote
        assert tokens(first) == tokens(second)
        first.shutdown()
        assert len(tokens(second)) == 2
        second.shutdown()
