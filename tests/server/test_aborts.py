"""Connections broken at any moment, and more requests than fit, against the real server."""

from __future__ import annotations

import json
import random
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import psutil
import pytest
from tests.support.server import DENSE, PATIENCE_S, RealServer, serving, until

_NUM_CLIENTS = 8
_ROUNDS = 3
_MEMORY_GROWTH = 1.05
_REFUSED_WITHIN_S = 0.05
_CANARIES = ("def main(", "import os", "class ")
_HANG_UP_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: a reset, not a polite end
ENDLESS: dict[str, Any] = {
    "prompt": "def main(", "temperature": 0, "max_tokens": 1900, "ignore_eos": True,
}  # fmt: skip


# --- connections that break


class Breaker:
    """Asks, and breaks the connection at a random moment."""

    def __init__(self, server: RealServer, seed: int) -> None:
        url = httpx2.URL(server.url)
        self._address = (url.host, url.port or 0)
        self._random = random.Random(seed)
        self._moments: list[Callable[[socket.socket, bytes], None]] = [
            self._before_the_first_byte,
            self._in_the_body,
            self._in_the_prefill,
            self._in_the_answer,
            self._after_the_end,
        ]

    def break_one(self) -> None:
        """One connection, from its beginning to its end."""
        moment = self._random.choice(self._moments)
        body = {
            "model": DENSE,
            # Ids, so that no prompt finds its beginning in the cache.
            "prompt": [self._random.randrange(4, 400) for _ in range(300)],
            "max_tokens": 2 if moment == self._after_the_end else 400,
            "ignore_eos": True,
            "n": self._random.choice((1, 1, 2)),
            "stream": self._random.random() < 0.5,
        }
        data = json.dumps(body).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data)
        )
        with socket.create_connection(self._address, PATIENCE_S) as sock:
            if self._random.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _HANG_UP_AT_ONCE)
            moment(sock, head + data)

    def _before_the_first_byte(self, sock: socket.socket, request: bytes) -> None:
        del sock, request

    def _in_the_body(self, sock: socket.socket, request: bytes) -> None:
        sock.sendall(request[: self._random.randrange(1, len(request))])

    def _in_the_prefill(self, sock: socket.socket, request: bytes) -> None:
        sock.sendall(request)
        time.sleep(self._random.uniform(0, 0.1))  # the moment is the point

    def _in_the_answer(self, sock: socket.socket, request: bytes) -> None:
        """Where it streams; else some time in its decoding."""
        sock.sendall(request)
        sock.settimeout(self._random.uniform(0.1, 1.0))
        try:
            while sock.recv(4096):
                if self._random.random() < 0.5:
                    return
        except TimeoutError:
            return

    def _after_the_end(self, sock: socket.socket, request: bytes) -> None:
        sock.sendall(request)
        answer = bytearray()
        while data := sock.recv(4096):
            answer += data
        assert answer.startswith(b"HTTP/1.1 200 "), bytes(answer[:500])


@contextmanager
def canaries(server: RealServer) -> Iterator[list[str]]:
    """Streams of fixed greedy prompts, again and again until the block ends: what went wrong."""

    def ask(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        stream = server.stream(body).finish()
        return stream.text if stream.is_done else f"broken: {stream.lines[-1:]} {stream.error}"

    expected = {prompt: ask(prompt) for prompt in _CANARIES}
    wrong, is_over, counts = [], threading.Event(), []

    def run() -> None:
        while not is_over.is_set():
            for prompt in _CANARIES:
                if (text := ask(prompt)) != expected[prompt]:
                    wrong.append(text)
                counts.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield wrong
    finally:
        is_over.set()
        thread.join(PATIENCE_S)
    assert counts and not thread.is_alive()


def watched(server: RealServer) -> list[psutil.Process]:
    return [*server.http(), server.engine()]


def check_aborts(num_connections: int) -> None:
    # A request that is not given back counts against its tenant's limit for ever.
    with serving("--max-requests-per-tenant", str(4 * _NUM_CLIENTS)) as server:
        break_many(server, _NUM_CLIENTS * 4, seed=0)  # what is allocated once
        assert until(server.is_idle)
        with server.client() as client:  # one connection, open as it is measured later too
            client.get("/health")
            descriptors = [process.num_fds() for process in watched(server)]
        memory = [process.memory_info().rss for process in watched(server)]
        with canaries(server) as wrong:
            for number in range(_ROUNDS):
                break_many(server, num_connections // _ROUNDS, seed=1 + number)
        assert wrong == []
        assert until(server.is_idle), server.metrics()

        def same_descriptors() -> bool:
            with server.client() as client:
                client.get("/health")
                return [process.num_fds() for process in watched(server)] == descriptors

        assert until(same_descriptors), ([p.num_fds() for p in watched(server)], descriptors)
        grown = [
            process.memory_info().rss / before
            for process, before in zip(watched(server), memory, strict=True)
        ]
        assert max(grown) < _MEMORY_GROWTH, grown
        streams = [server.stream(ENDLESS | {"max_tokens": 2}) for _ in range(4 * _NUM_CLIENTS)]
        assert [each.finish().status for each in streams] == [200] * len(streams)
        assert not any("Traceback" in line or "ERROR" in line for line in server.said), server.said


def break_many(server: RealServer, num_connections: int, seed: int) -> None:
    breakers = [Breaker(server, seed * num_connections + i) for i in range(num_connections)]
    with ThreadPoolExecutor(_NUM_CLIENTS) as clients:
        for done in [clients.submit(breaker.break_one) for breaker in breakers]:
            done.result()


def test_broken_connections_leave_nothing() -> None:
    check_aborts(200)


@pytest.mark.full
def test_two_thousand_broken_connections_leave_nothing() -> None:
    check_aborts(2000)


# --- more than fits


def test_what_is_too_much_is_told_so_at_once() -> None:
    limits = ("--max-waiting-requests", "2", "--max-num-seqs", "2")
    keys = ("--api-key", "one", "--api-key", "two")
    with serving(*limits, *keys, "--max-requests-per-tenant", "3") as server:
        body = ENDLESS | {"max_tokens": 200}
        accepted = [server.stream(body, key="one") for _ in range(2)]
        assert all(each.has_begun.wait(PATIENCE_S) for each in accepted)
        for waiting, key in ((1, "one"), (2, "two")):
            accepted.append(server.stream(body, key=key))
            assert until(lambda n=waiting: queue(server) == (2, n))  # type: ignore[misc]
        for key, status in (("one", 429), ("two", 503)):
            took = []
            with server.client(key) as client:
                client.get("/health")
                for streams in (True, False) * 10:
                    began_s = time.perf_counter()
                    refused = client.post(
                        "/v1/completions", json={"model": DENSE, **body, "stream": streams}
                    )
                    took.append(time.perf_counter() - began_s)
                    assert refused.status_code == status, refused.text
                    assert 1 <= int(refused.headers["retry-after"]) <= 60
                    assert refused.json()["error"]["message"]
            assert statistics.median(took) < _REFUSED_WITHIN_S, took
        assert all(each.is_alive() for each in accepted), "refused while these were there"
        assert all(each.finish(2 * PATIENCE_S).is_done for each in accepted)
        assert len({each.text for each in accepted}) == 1
        assert until(lambda: server.is_idle(key="one"))
        assert server.metrics(key="one")["request_refused_total"] == 40


def queue(server: RealServer) -> tuple[float, float]:
    metrics = server.metrics(key="one")
    return metrics["num_requests_running"], metrics["num_requests_waiting"]
