"""Rows 11, 14, 15, 17, 18, 85 and 87: clients that send oddly, slowly, or leave."""

from __future__ import annotations

import json
import random
import selectors
import socket
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import httpx2
import pytest
from tests.server.bad_input.case import (
    BODIES,
    COMPLETIONS,
    KEYS,
    LONGEST,
    MAX_BODY_BYTES,
    TEXT,
    changed,
)
from tests.server.contract import unharmed
from tests.support.server import PATIENCE_S, RealServer, until

KIB, MIB = 2**10, 2**20
HEAD = b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer %b\r\n"
HANG_UP_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: a reset, not a polite end


def head(path: str, *lines: bytes) -> bytes:
    first = HEAD % (path.encode(), KEYS[0].encode())
    return first + b"\r\n".join([b"content-type: application/json", *lines, b"", b""])


def whole(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return head(path, b"content-length: %d" % len(data)) + data


def connect(server: RealServer, receive_bytes: int = 0) -> socket.socket:
    url = httpx2.URL(server.url)
    with ExitStack() as stack:
        connection = stack.enter_context(socket.socket())
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(PATIENCE_S)
        connection.connect((url.host, url.port or 0))
        stack.pop_all()
    return connection


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(64 * KIB):
            received += data
    return received


def told(server: RealServer, first: bytes, filler: bytes = b"", num: int = 0) -> bytes:
    """What is answered; sending stops where the server has closed."""
    with connect(server) as connection:
        with suppress(ConnectionError):
            connection.sendall(first)
            for _ in range(num):
                connection.sendall(filler)
        return read_all(connection)


def test_row_11_chunks_without_end(server: RealServer) -> None:
    """Refused once they are too large, and never held twice."""
    before = [process.memory_info().rss for process in server.http()]
    with unharmed(server, KEYS[0], slack_bytes=MAX_BODY_BYTES):
        for path in BODIES:
            chunked = head(path, b"transfer-encoding: chunked")
            answer = told(server, chunked, b"%x\r\n%b\r\n" % (MIB, b" " * MIB), 64)
            assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close\r\n" in answer
            for process, size in zip(server.http(), before, strict=True):
                assert process.memory_info().rss - size < 2 * MAX_BODY_BYTES


def test_row_14_headers(server: RealServer, pytestconfig: pytest.Config) -> None:
    endless = 6000 if pytestconfig.getoption("--full") else 64  # MiB
    with unharmed(server, KEYS[0]):
        for path in BODIES:
            first = HEAD % (path.encode(), KEYS[0].encode())
            many = first + b"a: b\r\n" * 300 + b"\r\n"
            for request in (first + b"a: " + b"x" * 64 * KIB + b"\r\n\r\n", many):
                assert told(server, request).startswith(b"HTTP/1.1 431 ")
        assert told(server, first + b"a: ", b"x" * MIB, endless).startswith(b"HTTP/1.1 431 ")


def test_row_15_chunks_of_a_byte(server: RealServer) -> None:
    with unharmed(server, KEYS[0]):
        for path in BODIES:
            chunked = head(path, b"transfer-encoding: chunked", b"connection: close")
            answer = told(server, chunked, b"1\r\nx\r\n" * KIB, 3 * KIB)
            assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")), answer[:200]
            few = json.dumps(BODIES[path]).encode()[:-1]
            few = b"".join(b"1\r\n%c\r\n" % byte for byte in few + b"x") + b"0\r\n\r\n"
            assert told(server, chunked + few).startswith(b"HTTP/1.1 400 ")


def test_row_17_slow_writers(server: RealServer, pytestconfig: pytest.Config) -> None:
    num_sockets = 1000 if pytestconfig.getoption("--full") else 150
    kept = unharmed(server, KEYS[0], slack_bytes=num_sockets * 32 * KIB)  # for the next ones
    with kept, ExitStack() as stack, selectors.DefaultSelector() as selector:
        answers: dict[socket.socket, bytes] = {}
        for number in range(num_sockets):
            path = list(BODIES)[number % len(BODIES)]
            begun = (HEAD % (path.encode(), b"x") + b"a: ", head(path, b"content-length: 1000"))
            connection = stack.enter_context(connect(server))
            connection.sendall(begun[number % 2])
            selector.register(connection, selectors.EVENT_READ)
            answers[connection] = b""
        deadline_s = time.monotonic() + PATIENCE_S
        while selector.get_map():
            assert time.monotonic() < deadline_s, f"{len(selector.get_map())} are still open"
            for key, _ in selector.select(1.0):
                assert isinstance(key.fileobj, socket.socket)
                data = b""
                with suppress(ConnectionResetError):
                    data = key.fileobj.recv(4 * KIB)
                answers[key.fileobj] += data
                if not data:
                    selector.unregister(key.fileobj)
            for key in list(selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                with suppress(ConnectionError):
                    key.fileobj.send(b" ")
        statuses = Counter(answer[:12] for answer in answers.values())
        assert statuses == {b"HTTP/1.1 408": num_sockets}


def test_row_18_readers_that_do_not(server: RealServer, pytestconfig: pytest.Config) -> None:
    """As many at a time as can run beside the canaries; they stay when their text is written.

    So many at once touch the whole KV arena, and set the most the HTTP process ever held: what the
    first round leaves, the next two may not add to.
    """
    num_sockets = 1000 if pytestconfig.getoption("--full") else 20
    _hold_unread(server, num_sockets)
    with unharmed(server, KEYS[0]):
        for _ in range(2):
            _hold_unread(server, num_sockets)


def _hold_unread(server: RealServer, num_sockets: int) -> None:
    before = [process.memory_info().rss for process in server.http()]
    with ExitStack() as stack:
        for number in range(num_sockets):
            path = TEXT[number % len(TEXT)]
            more = {} if path == "/v1/responses" else {"n": 2}
            body = changed(path, stream=True, **{LONGEST[path]: 60}, **more)
            connection = stack.enter_context(connect(server, receive_bytes=4 * KIB))
            connection.sendall(whole(path, body))
            assert connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
            if number % 20 == 19:
                assert until(lambda: server.metrics(key=KEYS[0])["num_requests_running"] <= 8)
        for process, size in zip(server.http(), before, strict=True):
            assert process.memory_info().rss - size < (16 + num_sockets) * MIB


MOMENTS = ("in the head", "in the body", "at once", "in the prefill", "decoding", "at the end")


@pytest.mark.parametrize("path", [*TEXT, "/v1/embeddings"])
def test_row_85_clients_that_leave(server: RealServer, path: str) -> None:
    lots = random.Random(path)
    with unharmed(server, KEYS[0]):
        for moment in MOMENTS * 4:
            prompt = " ".join(str(lots.random()) for _ in range(8))
            said: Any = prompt
            if path == "/v1/chat/completions":
                said = [{"role": "user", "content": prompt}]
            field = {"/v1/chat/completions": "messages", COMPLETIONS: "prompt"}.get(path, "input")
            body = changed(path, **{field: said})
            if path in LONGEST:
                length = 2 if moment == "at the end" else 100
                body |= {LONGEST[path]: length, "stream": lots.random() < 0.5}
            leave(server, moment, whole(path, body), politely=lots.random() < 0.5)
    assert until(lambda: server.is_idle(key=KEYS[0]))


def leave(server: RealServer, moment: str, request: bytes, politely: bool) -> None:
    with connect(server) as connection:
        if not politely:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, HANG_UP_AT_ONCE)
        match moment:
            case "in the head":
                connection.sendall(request[:30])
            case "in the body":
                connection.sendall(request[:-10])
            case "at once":
                connection.sendall(request)
            case "in the prefill":
                connection.sendall(request)
                time.sleep(0.01)  # the moment is the point
            case "decoding":
                connection.sendall(request)
                connection.recv(1)
            case "at the end":
                connection.sendall(request.replace(b"host:", b"connection: close\r\nhost:"))
                assert b" 200 OK" in read_all(connection)


def test_row_87_many_that_leave_at_once(server: RealServer, pytestconfig: pytest.Config) -> None:
    num = 10_000 if pytestconfig.getoption("--full") else 1000
    request = whole(COMPLETIONS, changed(COMPLETIONS, max_tokens=100, stream=True))

    def run(number: int) -> None:
        leave(server, "at once", request[: number * 7 % (len(request) + 1)], bool(number % 2))

    began_s = time.monotonic()
    with unharmed(server, KEYS[0]), ThreadPoolExecutor(8) as clients:
        for done in [clients.submit(run, number) for number in range(num)]:
            done.result()
    assert time.monotonic() - began_s < PATIENCE_S
