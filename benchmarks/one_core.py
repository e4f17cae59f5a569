"""A device that computes on one core, with the rest of the machine for all else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil

from spanwise.engine.async_engine import AsyncEngine
from spanwise.engine.config import EngineConfig

PROGRAM = [sys.executable, "-m", "spanwise"]
_COMPUTING = "spanwise.worker."


@contextmanager
def on_one_core() -> Iterator[None]:
    """Keep this process, and what it starts meanwhile, on the first core it may use."""
    with _on({min(os.sched_getaffinity(0))}):
        yield


@asynccontextmanager
async def engine_on_one_core(config: EngineConfig) -> AsyncIterator[AsyncEngine]:
    """An engine whose one device has a core to itself until the block ends."""
    cores = os.sched_getaffinity(0)
    with on_one_core():
        engine = await AsyncEngine.start(config)
    try:
        async with engine:
            _move_to(cores - {min(cores)} or cores, psutil.Process())
            yield engine
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def _on(wanted: set[int]) -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """``spanwise serve`` until the block ends; gives its URL, once it is ready.

    It starts on one core, so that its device computes with one thread, which stays there; its
    other processes get the rest of the machine, and so do this one and the clients it starts.
    """
    cores = os.sched_getaffinity(0)
    rest = cores - {min(cores)} or cores
    with on_one_core():
        server = subprocess.Popen(
            [*PROGRAM, "serve", *arguments, "--port", "0"], stderr=subprocess.PIPE, text=True
        )
    assert server.stderr is not None
    try:
        url, said = "", []
        for line in server.stderr:
            said.append(line)
            url = url or "".join(re.findall(r"http://[\d.:]+", line))
            if line.startswith("ready"):
                break
        else:
            raise SystemExit("the server has ended: " + "".join(said))
        # What it says from now on must not fill the pipe.
        reader = threading.Thread(target=sys.stderr.writelines, args=(server.stderr,))
        reader.start()
        _move_to(rest, psutil.Process(server.pid))
        with _on(rest):
            yield url
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    reader.join()
    server.stderr.close()


def _move_to(cores: set[int], program: psutil.Process) -> None:
    """Let a program's processes run on these cores, but those that compute."""
    for process in [program, *program.children(recursive=True)]:
        if not any(word.startswith(_COMPUTING) for word in process.cmdline()):
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cores)
