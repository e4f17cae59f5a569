"""An engine in a process of its own, from the side that asks.

Between its jobs all its processes are stopped: vLLM polls while it waits, and would take from the
core on which the others are measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from answering import Job, Options

_END_TIMEOUT_S = 60.0
_LAST_LINES = 20


@dataclass(frozen=True)
class EngineSpec:
    """How an engine is started: its file, its Python, how many cores, and options of its own."""

    file: str
    num_cores: int = 1
    options: Options = field(default_factory=dict)
    python: Path = Path(sys.executable)
    environment: Mapping[str, str] = field(default_factory=dict)


class Child:
    """A loaded engine that waits for jobs; leaving the block ends it and all its processes."""

    def __init__(self, name: str, spec: EngineSpec, options: Options, log: Path) -> None:
        self.name = name
        self._log = log
        cores = sorted(os.sched_getaffinity(0))[: spec.num_cores]
        if len(cores) < spec.num_cores:
            raise SystemExit(f"{name} needs {spec.num_cores} cores, {len(cores)} are there")
        given = options | spec.options | {"cores": cores}
        command = [str(spec.python), str(Path(__file__).with_name(spec.file)), json.dumps(given)]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | dict(spec.environment),
                # Stopped processes in the group of whoever started us could get us all a SIGHUP.
                start_new_session=True,
            )
        begin_s = time.perf_counter()
        self.versions: dict[str, str] = self._answer()
        self.load_s = time.perf_counter() - begin_s
        self._signal(signal.SIGSTOP)

    def ask(self, jobs: Sequence[Job]) -> list[float]:
        """The seconds of each job, one after the other."""
        assert self._process.stdin is not None
        seconds = []
        with self._awake():
            for job in jobs:
                self._process.stdin.write(json.dumps(job) + "\n")
                self._process.stdin.flush()
                seconds.append(float(self._answer()))
        return seconds

    def memory_bytes(self) -> int:
        """Of all its processes together (PSS: a page that n processes share counts 1/n in each)."""
        return sum(int(process.memory_full_info().pss) for process in self._tree())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signal(signal.SIGCONT)
        tree = self._tree()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        _, alive = psutil.wait_procs(tree, _END_TIMEOUT_S)
        for process in alive:
            process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _tree(self) -> list[psutil.Process]:
        own = psutil.Process(self._process.pid)
        return [own, *own.children(recursive=True)]

    @contextmanager
    def _awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        yield
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            process.send_signal(number)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = "\n".join(self._log.read_text().splitlines()[-_LAST_LINES:])
            raise SystemExit(f"{self.name} has ended; it said last:\n{said}")
        return json.loads(line)
