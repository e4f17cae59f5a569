"""The real server, started as a user starts it, and its clients."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx2
import psutil

DENSE = "spanwise/tiny-dense"
PATIENCE_S = 60.0  # the machine may be busy
_ADDRESS = re.compile(r" on (https?://\S+) \(loading\)(?:\"})?$")  # as text or as JSON
# Threads that wait for each other without spinning: many times faster where others compute too.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
_SMALL = ("--dtype", "float32", "--kv-cache-memory", "32MiB", "--port", "0")


def command(*arguments: str) -> list[str]:
    """The command line that serves the embedded model."""
    return [sys.executable, "-m", "spanwise", "serve", *arguments]


def until(is_so: Callable[[], bool], timeout_s: float = PATIENCE_S) -> bool:
    """Wait for what no event tells; False where it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that only waits to be reaped has ended."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def command_line(process: psutil.Process) -> list[str]:
    """What it was started as; nothing of one that has ended."""
    try:
        return [str(word) for word in process.cmdline()]
    except psutil.NoSuchProcess:
        return []


class Listener(threading.Thread):
    """A client of its own, with a stream: ``lines`` as they come, and how it ended.

    ``port`` is its own end's.
    """

    def __init__(self, server: RealServer, body: dict[str, Any], **options: Any) -> None:
        super().__init__(daemon=True)
        self._client, self._body = server.client(**options), body
        self.status = self.port = 0
        self.lines: list[str] = []
        self.error: httpx2.HTTPError | None = None
        self.has_begun = threading.Event()
        self.start()

    def run(self) -> None:
        """Read to the end."""
        post = partial(self._client.stream, "POST", "/v1/completions")
        try:
            with self._client, post(json=self._body | {"stream": True}) as answer:
                self.status = answer.status_code
                local = answer.extensions["network_stream"].get_extra_info("client_addr")
                self.port = int(local[1])
                for line in answer.iter_lines():
                    if line:
                        self.lines.append(line)
                        self.has_begun.set()
        except httpx2.HTTPError as error:
            self.error = error
        finally:
            self.has_begun.set()

    def finish(self, timeout_s: float = PATIENCE_S) -> Listener:
        """Wait for the end."""
        self.join(timeout_s)
        assert not self.is_alive(), f"the stream goes on: {self.lines[-1:]}"
        return self

    @property
    def is_done(self) -> bool:
        """Whether it ended as a whole answer does."""
        return self.lines[-1:] == ["data: [DONE]"]

    @property
    def events(self) -> list[dict[str, Any]]:
        """What was said, but the mark of the end."""
        said = [line.removeprefix("data: ") for line in self.lines if line.startswith("data: ")]
        return [json.loads(each) for each in said if each != "[DONE]"]

    @property
    def text(self) -> str:
        """The answer's text."""
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return "".join(choice["text"] for choice in choices)

    @property
    def failure(self) -> dict[str, Any] | None:
        """The error event it ended with, if any."""
        error: dict[str, Any] | None = self.events[-1].get("error") if self.events else None
        return error


@dataclass
class RealServer:
    """A server that runs; ``said`` are the lines of its standard error so far."""

    popen: subprocess.Popen[bytes]
    url: str
    said: list[str]
    reader: threading.Thread
    verify: Any = True
    phases: list[str] = field(default_factory=list)

    def client(self, key: str | None = None, **options: Any) -> httpx2.Client:
        """A plain client, with an API key."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx2.Client(
            base_url=self.url,
            timeout=PATIENCE_S,
            headers=headers,
            verify=self.verify if self.url.startswith("https") else False,  # takes its time
            trust_env=False,
            **options,
        )

    def stream(self, body: dict[str, Any], **options: Any) -> Listener:
        """Begin to stream a completion."""
        return Listener(self, {"model": DENSE} | body, **options)

    def complete(self, body: dict[str, Any], **options: Any) -> httpx2.Response:
        """A completion, whole."""
        with self.client(**options) as client:
            return client.post("/v1/completions", json={"model": DENSE} | body)

    def metrics(self, **options: Any) -> dict[str, float]:
        """Every value without further labels, by name."""
        with self.client(**options) as client:
            lines = client.get("/metrics").raise_for_status().text.splitlines()
        found = [re.fullmatch(r"spanwise:(\w+)\{[^}]*\} (\S+)", line) for line in lines]
        return {match[1]: float(match[2]) for match in found if match is not None}

    def is_idle(self, **options: Any) -> bool:
        """Whether nothing runs, waits, or holds a block."""
        metrics = self.metrics(**options)
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(metrics[name] == 0 for name in names)

    def wait_ready(self) -> None:
        """Wait until requests are taken, and keep the phases that were told until then."""

        def is_ready() -> bool:
            assert self.popen.poll() is None, self.said
            answer = client.get("/ready")
            if answer.status_code == 200:
                return True
            assert answer.status_code == 503, answer.text
            phase = answer.json()["error"]["message"]
            if phase not in self.phases:
                self.phases.append(phase)
            return False

        with self.client() as client:
            assert until(is_ready), (self.phases, self.said)

    def processes(self) -> list[psutil.Process]:
        """All that the program has started."""
        return psutil.Process(self.popen.pid).children(recursive=True)

    def http(self) -> list[psutil.Process]:
        """The processes that answer HTTP."""
        return self._running("spanwise.server.process")

    def engine(self) -> psutil.Process:
        """The engine process."""
        (found,) = self._running("spanwise.engine.process")
        return found

    def workers(self) -> list[psutil.Process]:
        """The processes of the ranks, in no order: leaves of the fork server's tree."""
        return [
            each for each in self._running("spanwise.worker.fork_server") if not each.children()
        ]

    def _running(self, module: str) -> list[psutil.Process]:
        return [each for each in self.processes() if module in command_line(each)]

    def end_log(self) -> list[str]:
        """Standard error, once the program has ended."""
        self.reader.join(PATIENCE_S)
        assert not self.reader.is_alive(), "somebody still holds its standard error"
        return self.said


@contextmanager
def serving(
    *arguments: str, verify: Any = True, ready: bool = True, **environment: str
) -> Iterator[RealServer]:
    """Serve until the block ends, in a process group of its own as below a terminal."""
    popen = subprocess.Popen(
        command(DENSE, *_SMALL, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | _ENVIRONMENT | environment,
        start_new_session=True,
    )
    assert popen.stderr is not None
    # Lines end at LF alone: a CR that somebody gets into the log shall be seen.
    stderr = io.TextIOWrapper(popen.stderr, "utf-8", newline="\n")
    said = [stderr.readline().rstrip("\n")]

    def read() -> None:
        for line in stderr:
            said.append(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        match = _ADDRESS.search(said[0])
        assert match is not None, said
        server = RealServer(popen, match[1], said, reader, verify)
        if ready:
            server.wait_ready()
        yield server
        popen.terminate()
        popen.wait(PATIENCE_S)
    finally:
        popen.kill()
        popen.wait()
        reader.join(PATIENCE_S)
        stderr.close()
