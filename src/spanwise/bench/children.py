"""Measurements one after the other, each in a fresh process that shares nothing with the last."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Protocol, TypeVar

import msgspec

from spanwise.bench.job import Broken, Job, Reply, Told
from spanwise.errors import EngineError
from spanwise.worker.failure import error_of
from spanwise.worker.lifeline import Lifeline
from spanwise.worker.messages import Failed
from spanwise.worker.python_process import python_path

ResultType = TypeVar("ResultType")


class Watcher(Protocol):
    """Who looks on while it is measured."""

    def step(self, line: str) -> None:
        """Take the line of a measurement that begins."""

    def detail(self, line: str) -> None:
        """Take what the measurement says of itself."""

    def end(self) -> None:
        """Hear that nothing more is measured."""

    def note(self, line: str) -> None:
        """Take a line to keep."""


class Children:
    """Runs jobs, one at a time."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._num_expected = self._num_begun = 0

    def expect(self, num_jobs: int) -> None:
        """Say that so many jobs more will come, so that a watcher sees how far it is."""
        self._num_expected += num_jobs

    def run(
        self,
        name: str,
        job: Job,
        expected: type[ResultType],
        environment: Mapping[str, str] | None = None,
    ) -> ResultType:
        """Give the result of a job, which ends with this process if that ends first.

        Raises what the job raised, or EngineError where its process ended without a word.
        """
        self._num_begun += 1
        of = max(self._num_expected, self._num_begun)
        self._watcher.step(f"[{self._num_begun}/{of}] {name}")
        lifeline = Lifeline()
        read_fd, write_fd = os.pipe()
        fds = (write_fd, lifeline.read_fd)
        words = [*map(str, fds), msgspec.json.encode(job).decode()]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "spanwise.bench.child", *words],
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout is the result's
            env={**os.environ, **(environment or {}), "PYTHONPATH": python_path()},
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C is this process's to hear
        )
        os.close(write_fd)
        lifeline.close_read()
        try:
            reply = self._last_reply(read_fd)
        finally:
            lifeline.cut()
            code = process.wait()
        if reply is None:
            raise EngineError(f"the process that measured {name!r} {_ending(code)}")
        assert isinstance(reply, expected), reply
        return reply

    def _last_reply(self, fd: int) -> Reply | None:
        decoder = msgspec.json.Decoder(Reply)
        last: Reply | None = None
        with open(fd, "rb") as replies:
            for line in replies:
                last = decoder.decode(line)
                if isinstance(last, Told):
                    self._watcher.detail(last.line)
                elif isinstance(last, Broken):
                    raise error_of(Failed(last.kind, last.message))
                else:
                    return last
        return None


def _ending(code: int) -> str:
    return f"died from signal {-code}" if code < 0 else f"ended with exit code {code}"
