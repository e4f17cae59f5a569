"""What a server keeps whatever it is sent: how it refuses, and that nobody else notices."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2
import psutil
from tests.support.server import DENSE, PATIENCE_S, RealServer, command_line, until

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
TYPES |= {500: "server_error", 503: "overloaded_error"}
_MAX_ANSWER_BYTES = 64 << 10
_MAX_ERRORS = 10
_MAX_ECHO_CHARACTERS = 200
_SECRETS = re.compile(r"0x[0-9a-f]{6,}|Traceback|File \"|site-packages|/(?:dev|home|root|tmp|usr)/")
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?:INFO|WARNING) [ -~]*")

_PROMPTS = ("def main(", "import os", "class ", "return ", "for i in ", "if not ", "with ", "try:")
_CANARY_TOKENS = 16
_PAUSE_S = 0.2
_GENERATES_WITHIN_S = 1.0
_TRIES = 10  # on a busy machine the best of them counts
_MEMORY_GROWTH = 1.05
_COLLECTS_WITHIN_S = 10.0
_NOT_LASTING = "spanwise.engine.grammar_process"  # ended and replaced when a grammar is too much


def check_refusal(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer that is one, in every respect as it should be."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert len(answer.content) <= _MAX_ANSWER_BYTES
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    for name in ("param", "code"):
        assert error[name] is None or isinstance(error[name], str)
    assert error["message"].isprintable() and (error["param"] or "").isprintable()
    assert not _SECRETS.search(error["message"]), error["message"]
    said = error["message"].split("; ")
    assert max(map(len, said)) <= _MAX_ECHO_CHARACTERS + 100, error
    assert len(said) <= _MAX_ERRORS + 1, error
    assert len(error["param"] or "") <= _MAX_ECHO_CHARACTERS, error
    if status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
    return error


def check_log(lines: list[str]) -> None:
    """Whole lines of the server's own, whatever clients have sent; none of a failure."""
    wrong = [line for line in lines if not _LOG_LINE.fullmatch(line)]
    assert not wrong, wrong[:3]


def check_alive(client: httpx2.Client, body: dict[str, Any] | None = None) -> None:
    """It is healthy, and a real generation of one token passes in time."""
    assert client.get("/health").status_code == 200
    asked = {"model": DENSE, "prompt": "a", "max_tokens": 1} | (body or {})
    took_s = []
    for _ in range(_TRIES):
        began_s = time.monotonic()
        assert client.post("/v1/completions", json=asked).status_code == 200
        took_s.append(time.monotonic() - began_s)
        if took_s[-1] <= _GENERATES_WITHIN_S:
            return
    raise AssertionError(f"one token took {min(took_s):.2f} s")


# --- streams of others


class Canaries:
    """Eight streams of fixed greedy prompts, again and again; what they say must not change."""

    def __init__(self, server: RealServer, key: str | None) -> None:
        self._server, self._key = server, key
        self._right = [self._sing(prompt) for prompt in _PROMPTS]

    def sing(self) -> None:
        """Once, all at a time."""
        with ThreadPoolExecutor(len(_PROMPTS)) as pool:
            assert list(pool.map(self._sing, _PROMPTS)) == self._right

    @contextmanager
    def singing(self) -> Iterator[None]:
        """All the while; at least once each, and once more after the block."""
        is_over = threading.Event()

        def run(number: int) -> int:
            num_songs = 0
            while not is_over.is_set():
                assert self._sing(_PROMPTS[number]) == self._right[number]
                num_songs += 1
                is_over.wait(_PAUSE_S)
            return num_songs

        with ThreadPoolExecutor(len(_PROMPTS)) as pool:
            songs = [pool.submit(run, number) for number in range(len(_PROMPTS))]
            try:
                yield
            finally:
                is_over.set()
            assert all(each.result(PATIENCE_S) > 0 for each in songs)
        self.sing()

    def _sing(self, prompt: str) -> str:
        """What a prompt is answered; the answer is whole."""
        body = {
            "prompt": prompt,
            "max_tokens": _CANARY_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        stream = self._server.stream(body, key=self._key).finish()
        assert stream.is_done, (stream.status, stream.lines[-1:], stream.error)
        return stream.text


# --- what is left


@dataclass(frozen=True)
class _Footprint:
    """What the server's processes hold."""

    processes: dict[tuple[int, float], psutil.Process]
    descriptors: dict[tuple[int, float], int]
    memory_bytes: dict[tuple[int, float], int]


def _footprint(server: RealServer) -> _Footprint:
    found = [each for each in server.processes() if _NOT_LASTING not in command_line(each)]
    lasting = {(each.pid, each.create_time()): each for each in found}
    return _Footprint(
        lasting,
        {name: each.num_fds() for name, each in lasting.items()},
        {name: each.memory_info().rss for name, each in lasting.items()},
    )


@contextmanager
def unharmed(server: RealServer, key: str | None = None, slack_bytes: int = 0) -> Iterator[None]:
    """Fail unless the server is after the block as it was before, and canaries sang all the while.

    The same processes, healthy, quick, with nothing in them left open or held; memory within 5%
    (let the block repeat what it does), and ``slack_bytes`` that the last of it may leave behind
    until memory is collected.
    """
    canaries = Canaries(server, key)
    canaries.sing()
    assert until(lambda: server.is_idle(key=key))
    before, num_lines = _footprint(server), len(server.said)
    with canaries.singing():
        yield
    with server.client(key) as client:
        check_alive(client)
    assert until(lambda: server.is_idle(key=key)), server.metrics(key=key)
    assert _footprint(server).processes.keys() == before.processes.keys()
    assert until(lambda: not _opened(server, before)), _opened(server, before)
    grown = partial(_grown, server, key, before, slack_bytes)
    assert until(lambda: not grown(), _COLLECTS_WITHIN_S), grown()
    check_log(server.said[num_lines:])


def _opened(server: RealServer, before: _Footprint) -> list[tuple[psutil.Process, int, int]]:
    """Processes with more descriptors than they had, and both numbers."""
    now = _footprint(server).descriptors
    return [
        (before.processes[each], before.descriptors[each], count)
        for each, count in now.items()
        if count > before.descriptors[each]
    ]


def _grown(
    server: RealServer, key: str | None, before: _Footprint, slack_bytes: int
) -> list[tuple[psutil.Process, int, int]]:
    """Processes with more memory than they may have, and what they had and have."""
    server.metrics(key=key)  # what works, collects
    now = _footprint(server).memory_bytes
    return [
        (before.processes[each], before.memory_bytes[each], size)
        for each, size in now.items()
        if size > before.memory_bytes[each] * _MEMORY_GROWTH + slack_bytes
    ]
