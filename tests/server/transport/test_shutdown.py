"""Signals: what is finished, what is interrupted, and the exit code."""

from __future__ import annotations

import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.server.transport.application import event
from tests.server.transport.wire import (
    GET,
    KIB,
    QUICK,
    read_all,
    read_until,
    refused,
    serving,
    streams,
    wait_for,
)

from spanwise.errors import SpanwiseError
from spanwise.server.transport.server import HttpServer


def test_sigterm_lets_streams_finish_and_interrupts_the_rest(tmp_path: Path) -> None:
    options = {"shutdown_timeout_s": 3.0}
    with serving(tmp_path / "log", QUICK, **options) as server, ExitStack() as stack:
        idle = stack.enter_context(server.connect())
        half = stack.enter_context(server.connect())
        half.sendall(GET)
        opened = {True: [], False: []}  # type: dict[bool, list[socket.socket]]
        for index in range(16):
            connection = stack.enter_context(server.connect())
            num = 20 if index % 2 else 10_000
            connection.sendall(b"GET /stream?n=%d&every_ms=50 HTTP/1.1\r\n\r\n" % num)
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            opened[num == 20].append(connection)
        begin_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert read_all(idle) == b""
        assert refused(read_all(half), 503)["code"] == "shutting_down"
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        assert time.monotonic() - begin_s < 2.0
        for connection in opened[True]:
            answer = read_all(connection)
            assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert all(event(index) in answer for index in range(1, 20))
        for connection in opened[False]:
            assert read_all(connection).endswith(b"data: interrupted\n\n\r\n0\r\n\r\n")
        assert server.end() == 0
        assert 3.0 <= time.monotonic() - begin_s < 8.0


def test_a_second_signal_interrupts_and_a_third_cuts(tmp_path: Path) -> None:
    with serving(tmp_path / "log", QUICK) as server, ExitStack() as stack:
        reading = streams(server, 4, stack, "127.0.0.1")
        deaf = stack.enter_context(server.connect(receive_bytes=4 * KIB))
        deaf.sendall(b"GET /flood HTTP/1.1\r\n\r\n")
        wait_for(lambda: server.stats()["open"] == 5, "streams")
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        for connection in reading:
            assert read_all(connection).endswith(b"data: interrupted\n\n\r\n0\r\n\r\n")
        begin_s = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - begin_s < 3.0
    assert "Traceback" not in server.log.read_text()


def test_with_nothing_to_do_it_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "log", QUICK) as server, server.connect() as idle:
        idle.sendall(GET + b"\r\n")
        read_until(idle, b'"n": 0')
        begin_s = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - begin_s < 2.0
    quiet = [line for line in server.log.read_text().splitlines() if not line.startswith("access")]
    assert quiet == []


def test_an_application_that_does_not_start_is_an_error() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.failed", "message": "planted"})

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    with pytest.raises(SpanwiseError, match="could not start"):
        HttpServer(application, listening).run()
    assert listening.fileno() == -1
