"""The wire under clients that are wrong, slow, greedy or gone, while canary streams run on.

Run as a program this file is the server under test: a small application behind `HttpServer`.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import logging
import os
import re
import resource
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from spanwise.errors import InputError, SpanwiseError
from spanwise.server.transport import protocol as protocol_module
from spanwise.server.transport.access_log import AccessLog
from spanwise.server.transport.envelope import Envelope
from spanwise.server.transport.gate import Gate, client_of
from spanwise.server.transport.limits import TransportLimits
from spanwise.server.transport.meter import RequestMeter
from spanwise.server.transport.refusal import RefusedError
from spanwise.server.transport.server import HttpServer
from spanwise.server.transport.tls import tls_context

KIB, MIB = 2**10, 2**20
_PATIENCE_S = 30.0  # the machine may be busy
_POLL_S = 0.02

# --- the application under the transport


class App:
    """Streams, echoes, and misbehaves when asked to."""

    def __init__(self) -> None:
        self.num_open = 0
        self.num_sent_bytes = 0
        self.interrupted = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise RuntimeError("there is nothing to prepare")
        self.num_open += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.num_open -= 1

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        numbers = dict(re.findall(r"(\w+)=(\d+)", scope["query_string"].decode()))
        match scope["path"]:
            case "/stream":
                await self._stream(int(numbers["n"]), int(numbers["every_ms"]), receive, send)
            case "/flood":
                await self._flood(receive, send)
            case "/echo" | "/echo/":
                await self._echo(receive, send, scope["headers"])
            case "/later":
                await asyncio.sleep(int(numbers["ms"]) / 1000)
                await self._echo(receive, send, [])
            case "/wait":
                await _start(send)
                await _until_gone(receive)
            case "/early":
                await _reply(send, 401, {})
            case "/large":
                await _reply(send, 200, "x" * int(numbers["n"]))
            case "/named":
                await _reply(send, 200, {}, (b"X-Request-Id", b"mine"))
            case "/stats":
                stats = {"open": self.num_open - 1, "sent_bytes": self.num_sent_bytes}
                await _reply(send, 200, stats)
            case "/raises":
                raise RuntimeError("planted")
            case "/silent":
                return
            case _:
                await _reply(send, 404, {})

    async def _echo(self, receive: Any, send: Any, headers: Any) -> None:
        body = await _body(receive)
        if body is None:
            return
        names = [name.decode() for name, _ in headers]
        digest = hashlib.sha256(body).hexdigest()
        await _reply(send, 200, {"n": len(body), "sha256": digest, "headers": names})

    async def _stream(self, num: int, every_ms: int, receive: Any, send: Any) -> None:
        """Events at a steady pace, or an error event once interrupted."""
        await _start(send)
        gone = asyncio.create_task(_until_gone(receive))
        for index in range(num):
            if gone.done():
                return
            if self.interrupted.is_set():
                await send({"type": "http.response.body", "body": b"data: interrupted\n\n"})
                break
            await send({"type": "http.response.body", "body": event(index), "more_body": True})
            with suppress(TimeoutError):
                await asyncio.wait_for(self.interrupted.wait(), every_ms / 1000)
        else:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        gone.cancel()

    async def _flood(self, receive: Any, send: Any) -> None:
        """As much as the client takes."""
        await _start(send)
        gone = asyncio.create_task(_until_gone(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 4 * KIB, "more_body": True})
            self.num_sent_bytes += 4 * KIB
            await asyncio.sleep(0)


def event(index: int) -> bytes:
    return b"data: %d %s\n\n" % (index, hashlib.sha256(b"%d" % index).hexdigest().encode())


async def _start(send: Any) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _body(receive: Any) -> bytes | None:
    """The whole body, or None where the client has gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _reply(send: Any, status: int, value: Any, *headers: tuple[bytes, bytes]) -> None:
    body = json.dumps(value).encode()
    length = (b"content-length", b"%d" % len(body))
    start = {"type": "http.response.start", "status": status, "headers": [length, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def main(listening_fd: int, limits: str, options: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
    chosen = json.loads(options)
    app = App()
    certificate = chosen.get("certfile")
    HttpServer(
        app,
        socket.socket(fileno=listening_fd),
        limits=msgspec.json.decode(limits, type=TransportLimits),
        tls=tls_context(certificate) if certificate else None,
        shutdown_timeout_s=chosen.get("shutdown_timeout_s", 30.0),
        interrupt=app.interrupted.set,
        access_logger=logging.getLogger("access"),
    ).run()
    assert app.num_open == 0


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])


# --- the server process, seen from outside


@dataclass
class Server:
    address: tuple[str, int]
    process: subprocess.Popen[bytes]
    log: Path

    def connect(self, source: str = "127.0.0.1", receive_bytes: int = 0) -> socket.socket:
        with ExitStack() as stack:
            connection = stack.enter_context(socket.socket())
            if receive_bytes:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            connection.settimeout(_PATIENCE_S)
            connection.bind((source, 0))
            connection.connect(self.address)
            stack.pop_all()
        return connection

    def request(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(*self.address, timeout=_PATIENCE_S)
        try:
            connection.request(method, path, **more)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def stats(self) -> dict[str, int]:
        stats = self.request("GET", "/stats")[1]
        assert isinstance(stats, dict)
        return stats

    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def num_fds(self) -> int:
        return psutil.Process(self.process.pid).num_fds()

    def wait_until_idle(self, num_fds: int) -> None:
        """Return once nothing is open that was not at first."""
        wait_for(lambda: self.num_fds() <= num_fds, "descriptors back to start")
        wait_for(lambda: self.stats()["open"] == 0, "the end of all requests")

    def end(self, *numbers: signal.Signals) -> int:
        for number in numbers:
            self.process.send_signal(number)
        return self.process.wait(_PATIENCE_S)


@contextmanager
def serving(log: Path, limits: TransportLimits, **options: Any) -> Iterator[Server]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        fd = listening.fileno()
        arguments = [str(fd), msgspec.json.encode(limits).decode(), json.dumps(options)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, __file__, *arguments], pass_fds=[fd], stdout=output, stderr=output
            )
        address = listening.getsockname()
    server = Server(address, process, log)
    try:
        if not options.get("certfile"):
            assert server.request("GET", "/nothing")[0] == 404
        yield server
    finally:
        process.kill()
        process.wait()


def wait_for(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(_POLL_S)


# Short enough for a test to wait for.
QUICK = TransportLimits(
    max_body_bytes=4 * MIB,
    max_unfinished_bodies_bytes=16 * MIB,
    headers_timeout_s=1.5,
    body_window_s=1.0,
    body_timeout_s=5.0,
    write_window_s=1.5,
    keep_alive_timeout_s=20.0,
    max_connections_per_client=2000,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log", QUICK) as running:
        yield running


# --- canaries: streams of others, which nothing may disturb

_NUM_CANARIES = 8
_CANARY_EVENTS, _CANARY_EVERY_MS = 20, 25
_CANARY_LATE_S = 2.5
_CANARY = b"".join(map(event, range(_CANARY_EVENTS))) + b"data: [DONE]\n\n"


@contextmanager
def canaries(server: Server) -> Iterator[None]:
    """Streams before, during and after the block: whole, byte-identical and on time."""
    stop = threading.Event()
    faults: list[str] = []
    counts = [0] * _NUM_CANARIES

    def sing(index: int) -> None:
        while True:
            begin_s = time.monotonic()
            heard = _listen(server)
            late_s = time.monotonic() - begin_s - _CANARY_EVENTS * _CANARY_EVERY_MS / 1000
            if heard != _CANARY:
                faults.append(f"canary {index} heard {heard[-100:]!r}")
            elif late_s > _CANARY_LATE_S:
                faults.append(f"canary {index} was {late_s:.1f} s late")
            counts[index] += 1
            if stop.is_set():
                return

    threads = [threading.Thread(target=sing, args=(index,)) for index in range(_NUM_CANARIES)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: server.stats()["open"] >= _NUM_CANARIES, "canaries")
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults, faults
    assert min(counts) > 0


def _listen(server: Server) -> bytes:
    connection = http.client.HTTPConnection(*server.address, timeout=_PATIENCE_S)
    try:
        path = f"/stream?n={_CANARY_EVENTS}&every_ms={_CANARY_EVERY_MS}"
        connection.request("GET", path)
        return connection.getresponse().read()
    except (OSError, http.client.HTTPException) as error:
        return repr(error).encode()
    finally:
        connection.close()


# --- raw requests


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end; a reset ends it too."""
    received = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(64 * KIB):
            received += data
    return received


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    """Up to what is wanted, and whatever came with it."""
    received = b""
    while wanted not in received:
        data = connection.recv(64 * KIB)
        assert data, f"closed after {received[-300:]!r}"
        received += data
    return received


def exchange(server: Server, *pieces: bytes) -> bytes:
    """What is answered to bytes; sending stops where the server has closed."""
    with server.connect() as connection:
        with suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        return read_all(connection)


def refused(answer: bytes, status: int) -> dict[str, Any]:
    """The error of a refusal, which keeps the contract and is all there is."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert first.split()[1] == str(status), answer[:300]
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    assert ("retry-after" in headers) == (status == 503)
    error = json.loads(body)
    assert list(error) == ["error"]
    assert set(error["error"]) == {"message", "type", "param", "code"}
    kind = {503: "overloaded_error", 500: "server_error"}.get(status, "invalid_request_error")
    assert error["error"]["type"] == kind
    found: dict[str, Any] = error["error"]
    return found


def post(length: int | str, *headers: bytes) -> bytes:
    lines = [b"POST /echo HTTP/1.1", b"host: x", b"content-length: %b" % str(length).encode()]
    return b"\r\n".join([*lines, *headers, b"", b""])


CHUNKED = b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
GET = b"GET /echo HTTP/1.1\r\nhost: x\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# --- row 14: headers


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (GET + b"a: " + b"x" * 64 * KIB + b"\r\n\r\n", 431, "headers_too_large"),
        (GET + b"a: " + b"x" * 33 * KIB + b"\r\n\r\n", 431, "header_too_large"),
        (GET + b"x" * 33 * KIB + b": a\r\n\r\n", 431, "header_too_large"),
        (GET + b"a: b\r\n" * 300 + b"\r\n", 431, "too_many_headers"),
        (GET + (b"a: " + b"x" * 20 * KIB + b"\r\n") * 4 + b"\r\n", 431, "headers_too_large"),
        (b"GET /" + b"x" * 9 * KIB + b" HTTP/1.1\r\n\r\n", 414, "url_too_long"),
        (b"GET /?" + b"x" * MIB, 414, "url_too_long"),
    ],
)
def test_too_much_of_a_head_is_refused(
    server: Server, request_bytes: bytes, status: int, code: str
) -> None:
    begin_s = time.monotonic()
    assert refused(exchange(server, request_bytes), status)["code"] == code
    assert time.monotonic() - begin_s < 2.0


def test_heads_just_below_the_limits_are_taken(server: Server) -> None:
    many = GET + b"a: b\r\n" * 98 + b"connection: close\r\n\r\n"
    large = GET + b"a: " + b"x" * 31 * KIB + b"\r\nconnection: close\r\n\r\n"
    long = b"GET /" + b"x" * 8000 + b" HTTP/1.1\r\nconnection: close\r\n\r\n"
    assert exchange(server, many).startswith(b"HTTP/1.1 200 ")
    assert exchange(server, large).startswith(b"HTTP/1.1 200 ")
    assert exchange(server, long).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    ("head", "filler"),
    [
        (GET + b"a: ", b"x"),
        (GET, b"x"),
        (GET, b"a: b\r\n"),
        (b"", b"\r\n"),
        (CHUNKED + b"1;", b"x"),
        (CHUNKED + b"0\r\na: ", b"x"),
        (CHUNKED + b"0\r\n", b"a: b\r\n"),
    ],
    ids=["value", "name", "headers", "empty lines", "extension", "trailer", "trailers"],
)
def test_what_does_not_end_is_refused_and_not_kept(
    server: Server, head: bytes, filler: bytes
) -> None:
    before = server.rss_bytes()
    with canaries(server):
        answer = exchange(server, head, *[filler * (MIB // len(filler))] * 64)
    refused(answer, 431)
    assert server.rss_bytes() - before < 8 * MIB


def test_trailers_are_no_headers(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(CHUNKED + chunk(b"ab"))
        connection.sendall(b"0\r\nauthorization: x\r\n\r\n")
        connection.sendall(GET + b"connection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b"authorization" not in answer


def test_a_byte_at_a_time_is_parsed_like_all_at_once(server: Server) -> None:
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post(3, b"connection: close") + b"abc":
            connection.sendall(bytes([byte]))
        assert hashlib.sha256(b"abc").hexdigest().encode() in read_all(connection)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\na: b\x1bc\r\n\r\n",
        b"GET / HTTP/1.1\r\na\r\n\r\n",
        b"GET / HTTP/1.1\r\na: b\r\n folded\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET http://x HTTP/1.1\r\n\r\n",
        b"GET x:99999999 HTTP/1.1\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        post(-1),
        post("1a"),
        post(10**30),
        post(3, b"content-length: 4") + b"abcd",
        post(3, b"transfer-encoding: chunked") + b"0\r\n\r\n",
        CHUNKED + b"xyz\r\n",
        CHUNKED + b"fffffffffffffffff\r\n",
    ],
)
def test_what_is_no_http_is_refused(server: Server, request_bytes: bytes) -> None:
    assert refused(exchange(server, request_bytes), 400)["code"] == "malformed_request"


# --- rows 11 and 15: bodies


@pytest.mark.parametrize("length", [4 * MIB + 1, 10**18, "0" * 5000 + str(5 * MIB)])
def test_a_body_announced_as_too_large_is_refused_at_once(
    server: Server, length: int | str
) -> None:
    assert refused(exchange(server, post(length)), 413)["code"] == "body_too_large"


@pytest.mark.parametrize("expects", [True, False])
def test_a_body_too_large_is_refused_while_it_is_sent(server: Server, expects: bool) -> None:
    headers = (b"expect: 100-continue",) if expects else ()
    refused(exchange(server, post(64 * MIB, *headers), *[b"x" * MIB] * 64), 413)


def test_a_chunked_body_too_large_is_refused_and_not_kept(server: Server) -> None:
    before = server.rss_bytes()
    with canaries(server):
        for _ in range(3):
            answer = exchange(server, CHUNKED, *[chunk(b"x" * MIB)] * 64)
            assert refused(answer, 413)["code"] == "body_too_large"
    assert server.rss_bytes() - before < 2 * 4 * MIB + 8 * MIB


def test_bodies_up_to_the_limit_arrive_whole(server: Server) -> None:
    body = os.urandom(4 * MIB)
    wanted = hashlib.sha256(body).hexdigest()
    for sent in (body, iter([body[:7], body[7:]])):
        status, echo = server.request("POST", "/echo", body=sent)
        assert (status, echo["sha256"], echo["n"]) == (200, wanted, len(body))
    assert server.request("POST", "/echo", body=iter([body, b"x"]))[0] == 413
    # A client that sends all before it reads is told too.
    assert server.request("POST", "/echo", body=b"x" * 16 * MIB)[0] == 413
    zeros = "0" * 5000 + "3"
    assert b'"n": 3' in exchange(server, post(zeros, b"connection: close") + b"abc")


def test_one_byte_chunks_are_taken_in_linear_time_or_refused(server: Server) -> None:
    most = QUICK.max_num_chunks - 1
    with canaries(server):
        begin_s = time.monotonic()
        close = CHUNKED.replace(b"host: x", b"connection: close")
        answer = exchange(server, close, chunk(b"x") * most + b"0\r\n\r\n")
        assert b'"n": %d' % most in answer
        answer = exchange(server, CHUNKED, *[chunk(b"x") * KIB] * 3 * KIB)
        assert refused(answer, 413)["code"] == "too_many_chunks"
        assert time.monotonic() - begin_s < 10.0


def test_unfinished_bodies_share_a_budget(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(QUICK, max_unfinished_bodies_bytes=4 * MIB)
    with serving(tmp_path / "log", limits) as server, ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(server.connect())
            connection.sendall(post(2 * MIB) + b"x" * MIB)
        wait_for(lambda: server.stats()["open"] == 3, "three uploads")
        answer = exchange(server, post(2 * MIB), b"x" * 2 * MIB)
        assert refused(answer, 503)["code"] == "too_many_bodies"
        stack.close()
        wait_for(lambda: server.stats()["open"] == 0, "the end of the uploads")
        assert server.request("POST", "/echo", body=b"x" * 4 * MIB)[0] == 200


def test_an_early_answer_leaves_the_connection_usable(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(post(100_000).replace(b"/echo", b"/early") + b"x" * 50_000)
        time.sleep(0.1)
        connection.sendall(b"x" * 50_000 + GET + b"connection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert answer.count(b"HTTP/1.1 200 ") == 1


def test_an_offer_of_another_protocol_is_passed_over(server: Server) -> None:
    offer = (b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: x")
    with server.connect() as connection:
        connection.sendall(post(3, *offer) + b"abc" + post(4, *offer) + b"defg")
        connection.sendall(GET + b"connection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 3
    for body in (b"abc", b"defg", b""):
        assert hashlib.sha256(body).hexdigest().encode() in answer


# --- row 17: slow writers


@pytest.fixture
def num_sockets(pytestconfig: pytest.Config) -> int:
    return 1000 if pytestconfig.getoption("--full") else 300


@pytest.fixture(autouse=True, scope="module")
def enough_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def drip(connections: list[socket.socket], timeout_s: float) -> list[bytes]:
    """A byte to each again and again, until all are closed; what each was told."""
    told = dict.fromkeys(connections, b"")
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            assert time.monotonic() < deadline, f"{len(selector.get_map())} are still open"
            for key, _ in selector.select(0.2):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                try:
                    data = connection.recv(4 * KIB)
                except ConnectionResetError:
                    data = b""
                told[connection] += data
                if not data:
                    selector.unregister(connection)
            for key in list(selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                with suppress(ConnectionError):
                    key.fileobj.send(b"x")
    return list(told.values())


@pytest.mark.parametrize(
    ("head", "status"),
    [(GET + b"a: ", 408), (post(100_000), 408), (CHUNKED + b"ffff\r\n", 408), (b"", None)],
    ids=["headers", "body", "chunk", "nothing"],
)
def test_slow_writers_are_ended_in_time(
    server: Server, num_sockets: int, head: bytes, status: int | None
) -> None:
    num_fds, rss = server.num_fds(), server.rss_bytes()
    with canaries(server), ExitStack() as stack:
        connections = []
        for _ in range(num_sockets):
            connections.append(stack.enter_context(server.connect()))
            connections[-1].sendall(head)
        if status is None:
            told = [read_all(connection) for connection in connections]
            assert not any(told)
        else:
            # Long before a body has to be whole.
            for answer in drip(connections, QUICK.body_timeout_s - 1.0):
                assert refused(answer, status)["code"] == "request_timeout"
        assert server.rss_bytes() - rss < 32 * MIB
    server.wait_until_idle(num_fds)


def test_slow_headers_are_ended_after_any_number_of_requests(server: Server) -> None:
    with server.connect() as connection:
        for _ in range(2):
            connection.sendall(GET + b"\r\n")
            read_until(connection, b'"n": 0')
        connection.sendall(GET)
        assert refused(drip([connection], _PATIENCE_S)[0], 408)["code"] == "request_timeout"


def test_what_was_answered_early_does_not_stay(server: Server) -> None:
    """Neither where the rest of the request comes and nothing more, nor where it does not."""
    num_fds = server.num_fds()
    for rest in (b"x" * 10, b""):
        with server.connect() as connection:
            connection.sendall(post(10).replace(b"/echo", b"/early"))
            read_until(connection, b"{}")
            connection.sendall(rest)
            assert read_all(connection) == b""
    server.wait_until_idle(num_fds)


def test_an_upload_that_waits_for_the_application_is_not_slow(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(post(3, b"expect: 100-continue").replace(b"/echo", b"/later?ms=1500"))
        assert connection.recv(4 * KIB) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        read_until(connection, b'"n": 3')
    with server.connect() as connection:
        connection.sendall(post(MIB).replace(b"/echo", b"/later?ms=1500") + b"x" * MIB)
        read_until(connection, b'"n": 1048576')


def test_a_steady_upload_ends_at_the_last_deadline(server: Server) -> None:
    begin_s = time.monotonic()
    with server.connect() as connection:
        connection.sendall(post(MIB))
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            while not selector.select(0.5):
                connection.sendall(b"x" * 8 * KIB)
        answer = read_all(connection)
    assert refused(answer, 408)["code"] == "request_timeout"
    assert 4.5 < time.monotonic() - begin_s < 15.0


# --- row 18: slow readers


def test_slow_readers_are_paused_and_then_dropped(server: Server, num_sockets: int) -> None:
    num_fds, rss, sent = server.num_fds(), server.rss_bytes(), server.stats()["sent_bytes"]
    with canaries(server), ExitStack() as stack:
        connections = []
        for _ in range(num_sockets):
            connection = server.connect(receive_bytes=4 * KIB)
            connections.append(stack.enter_context(connection))
            connection.sendall(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        wait_for(lambda: server.stats()["open"] >= num_sockets, "floods")
        wait_for(lambda: server.stats()["open"] <= _NUM_CANARIES, "the end of the floods")
        per_stream = (server.stats()["sent_bytes"] - sent) / num_sockets
        assert per_stream < QUICK.write_buffer_bytes + 128 * KIB
        assert server.rss_bytes() - rss < num_sockets * 2 * QUICK.write_buffer_bytes
    server.wait_until_idle(num_fds)


def test_a_reader_that_is_only_slow_is_kept(server: Server) -> None:
    # So slow that what was written before a pause takes longer than a window.
    received = 0
    with server.connect(receive_bytes=4 * KIB) as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        end_s = time.monotonic() + 2.2 * QUICK.write_window_s
        while time.monotonic() < end_s:
            data = connection.recv(4 * KIB)
            assert data, f"dropped after {received} bytes"
            received += len(data)
            time.sleep(0.25)


@pytest.mark.parametrize("num_bytes", [3_000_000, 60_000], ids=["paused", "not paused"])
def test_an_answer_that_is_not_read_does_not_stay(server: Server, num_bytes: int) -> None:
    num_fds = server.num_fds()
    with server.connect(receive_bytes=4 * KIB) as connection:
        connection.sendall(b"GET /large?n=%d HTTP/1.1\r\nconnection: close\r\n\r\n" % num_bytes)
        wait_for(lambda: server.num_fds() > num_fds, "the connection")
        server.wait_until_idle(num_fds)
        assert len(read_all(connection)) < num_bytes


def test_a_large_answer_arrives_whole(server: Server) -> None:
    status, text = server.request("GET", "/large?n=3000000")
    assert status == 200
    assert text == "x" * 3_000_000


# --- connections


def streams(server: Server, num: int, stack: ExitStack, source: str) -> list[socket.socket]:
    opened = []
    for _ in range(num):
        connection = stack.enter_context(server.connect(source))
        connection.sendall(b"GET /stream?n=10000&every_ms=50 HTTP/1.1\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        opened.append(connection)
    return opened


def test_connections_are_bounded_in_all_and_per_client(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(QUICK, max_connections=16, max_connections_per_client=12)
    with serving(tmp_path / "log", limits) as server, ExitStack() as stack:
        num_fds = server.num_fds()
        streams(server, 12, stack, "127.0.0.1")
        begin_s = time.monotonic()
        assert refused(exchange(server, GET + b"\r\n"), 503)["code"] == "too_many_connections"
        assert time.monotonic() - begin_s < 1.0
        streams(server, 4, stack, "127.0.0.2")
        with server.connect("127.0.0.3") as connection:
            connection.sendall(GET + b"\r\n")
            refused(read_all(connection), 503)
        excess = [stack.enter_context(server.connect()) for _ in range(300)]
        for connection in excess:
            refused(read_all(connection), 503)
            # Some more are just being accepted or closed.
            assert server.num_fds() <= num_fds + 16 + limits.max_num_lingering + 32
        stack.close()
        server.wait_until_idle(num_fds)


def test_a_full_server_lets_go_of_those_that_want_nothing(tmp_path: Path) -> None:
    """As many sockets as there are places, on which nothing comes, keep nobody out."""
    limits = TransportLimits(max_connections=16, max_connections_per_client=12, evict_after_s=0.5)
    with serving(tmp_path / "log", limits) as server, ExitStack() as stack:
        for source, num in (("127.0.0.1", 12), ("127.0.0.2", 4)):
            idle = [stack.enter_context(server.connect(source)) for _ in range(num)]
            idle[0].sendall(GET)
        refused(exchange(server, GET + b"\r\n"), 503)
        time.sleep(limits.evict_after_s)
        live = streams(server, 12, stack, "127.0.0.1")
        time.sleep(limits.evict_after_s)
        refused(exchange(server, GET + b"\r\n"), 503)
        assert all(connection.recv(1) for connection in live)


def test_a_finished_client_waits_and_is_then_closed(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(QUICK, keep_alive_timeout_s=0.5)
    with serving(tmp_path / "log", limits) as server, server.connect() as connection:
        for _ in range(3):
            connection.sendall(GET + b"\r\n")
            read_until(connection, b'"n": 0')
            time.sleep(0.2)
        begin_s = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - begin_s < 3.0


def test_descriptors_that_run_out_are_waited_for(tmp_path: Path) -> None:
    with serving(tmp_path / "log", QUICK) as server, ExitStack() as stack:
        before = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        few = server.num_fds() + 4
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (few, before[1]))
        for _ in range(8):
            stack.enter_context(server.connect())
        wait_for(lambda: "cannot accept" in server.log.read_text(), "the log line")
        stack.close()
        assert server.request("GET", "/nothing")[0] == 404
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, before)


# --- one connection, several requests


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    bodies = [b"a", b"bb", b"ccc"]
    requests = b"".join(post(len(body)) + body for body in bodies)
    answer = exchange(server, requests + GET + b"connection: close\r\n\r\n")
    digests = [hashlib.sha256(body).hexdigest() for body in [*bodies, b""]]
    assert re.findall(rb'"sha256": "(\w+)"', answer) == [digest.encode() for digest in digests]


@pytest.mark.parametrize(
    "more", [(GET + b"\r\n") * 20, b"garbage\r\n\r\n", GET + b"a: b\r\n" * 300]
)
def test_what_follows_a_running_answer_never_gets_into_it(server: Server, more: bytes) -> None:
    num_fds = server.num_fds()
    with server.connect() as connection:
        connection.sendall(b"GET /stream?n=10000&every_ms=20 HTTP/1.1\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.sendall(more)
        assert b"HTTP/1.1" not in read_all(connection)
    server.wait_until_idle(num_fds)


def test_a_lost_connection_ends_every_request_on_it(server: Server) -> None:
    num_fds = server.num_fds()
    with server.connect() as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\n\r\n" * 3)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    server.wait_until_idle(num_fds)


# --- what is added around the application


def head_of(server: Server, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*server.address, timeout=_PATIENCE_S)
    try:
        connection.request("GET", path)
        return connection.getresponse()
    finally:
        connection.close()


def test_every_answer_has_one_request_id(server: Server) -> None:
    first, second = head_of(server, "/early"), head_of(server, "/early")
    given = [response.msg.get_all("x-request-id") or [] for response in (first, second)]
    assert [len(ids) for ids in given] == [1, 1]
    assert given[0] != given[1]
    assert head_of(server, "/named").msg.get_all("x-request-id") == ["mine"]
    assert first.getheader("date", "").endswith(" GMT")
    assert first.getheader("server") is None


@pytest.mark.parametrize("path", ["/raises", "/silent"])
def test_an_application_without_an_answer_is_answered_for(server: Server, path: str) -> None:
    answer = exchange(server, b"GET %b HTTP/1.1\r\n\r\n" % path.encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"date")]
    assert refused(b"\r\n".join(lines) + b"\r\n\r\n" + body, 500)["code"] == "internal_error"
    assert b"planted" not in answer


def test_the_access_log_holds_no_control_characters_and_no_query(server: Server) -> None:
    exchange(server, b"GET /%0d%0aforged%1b[31m%e2%80%a8%20x?key=secret HTTP/1.1\r\n\r\n", b"\0")
    exchange(server, b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\nconnection: close\r\n\r\n")
    exchange(server, post(10**9))
    with server.connect() as connection:
        connection.sendall(post(5) + b"abc")
        wait_for(lambda: server.stats()["open"] == 1, "the upload")
    exchange(server, CHUNKED.replace(b"/echo", b"/echo/?"), chunk(b"x" * MIB) * 5)
    wait_for(lambda: "path=/echo status=499" in server.log.read_text(), "the log lines")
    wait_for(lambda: "method=- path=- status=413" in server.log.read_text(), "the log lines")
    wait_for(lambda: "path=/echo/ status=413" in server.log.read_text(), "the log lines")
    text = server.log.read_text()
    lines = [line for line in text.split("\n") if line.startswith("access ")]
    pattern = r"access method=\S+ path=\S+ status=\d+ duration_ms=\d+\.\d request_id=\S+"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert not set(map(ord, text)) & {0x0D, 0x1B, 0x7F, 0x2028}
    assert r"path=/\r\nforged\x1b[31m\u2028\x20x " in text
    assert "secret" not in text
    assert "y" * 199 in text
    assert "y" * 201 not in text


def test_what_is_logged_is_there_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        AccessLog(logging.getLogger("x")).answered("GET", "/a b", 200, 0.25, "req_1\x1b")
        AccessLog(None).refused(431, "req_2")
    (record,) = caplog.records
    assert record.args == {
        "method": "GET",
        "path": r"/a\x20b",
        "status": 200,
        "duration_ms": 250.0,
        "request_id": r"req_1\x1b",
    }


# --- row 92: the end


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


# --- TLS

CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUAfZpUOH2F9qFjjOY22ePXeLG0NwwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTA0NTQyOFoYDzIxMjYxMDI4
MDQ1NDI4WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAT880TBGFugdBRHglV7EpmDC7HWn2sXRSF0zYn/2JGMqCR/5OI/dYQi
+wEeW7pKN2Ded9HBWoLEzsOFLsHGPECho28wbTAdBgNVHQ4EFgQU1epgHid2ksbp
qSpAdXssqvFsml8wHwYDVR0jBBgwFoAU1epgHid2ksbpqSpAdXssqvFsml8wDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgTp0oD7qNJE3Kq5BzEGJUfLhiocRhMomFNqOA8WW1jPICIGe3
60hy4Mn7saESH2A3qgkt9WYoKIt89iis52j2zWol
-----END CERTIFICATE-----
"""
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgaQUxxKNHpW8fc5wu
8Ydp6wnPs8WhBJ6N/WXRWh8SdGOhRANCAAT880TBGFugdBRHglV7EpmDC7HWn2sX
RSF0zYn/2JGMqCR/5OI/dYQi+wEeW7pKN2Ded9HBWoLEzsOFLsHGPECh
-----END PRIVATE KEY-----
"""
OTHER_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgHbtwMurmpOTovMx+
Go+d0VQLUgOHfu/xThpb0DlmZNOhRANCAAQyyO5sF1Yy5uGluae8NfVDtiVYm9VK
M3eupC751d66dXrL6xJ/UOGDE34jEwto2YtbCNGLCPyUDeBjwq0VIiEY
-----END PRIVATE KEY-----
"""
ENCRYPTED_KEY = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAighfesBVCCsAICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEJdKxrDWJLYh/ghaAT3IIQ4EgZBf
9EqDhXAOCU8r4vlwL6nNipzTpeRTVSesR7LdXIU1tXLYSHKtrben+jP3dp/SfKDk
mvojho28AZnSTrwXs6SSgBXZZ+Fq0SB8xt8NFvHwjkSlaCl/UfjHSQ7ZsZSHE8OG
Cmre1aSVG7MD3XbITpskpyPpfXcyUHXNI7i1hhUHMhh9VbsBTveh19ci0lSQr7c=
-----END ENCRYPTED PRIVATE KEY-----
"""


def test_tls_serves_refuses_and_ends_like_plain(tmp_path: Path) -> None:
    (tmp_path / "pem").write_text(CERTIFICATE + KEY)
    client = ssl.create_default_context(cadata=CERTIFICATE)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE  # the clock of a test machine may be anywhere
    limits = msgspec.structs.replace(QUICK, max_connections=20, evict_after_s=20.0)
    log, pem = tmp_path / "log", str(tmp_path / "pem")
    with serving(log, limits, certfile=pem) as server, ExitStack() as stack:

        def connect(receive_bytes: int = 0) -> socket.socket:
            raw = server.connect(receive_bytes=receive_bytes)
            return stack.enter_context(client.wrap_socket(raw, suppress_ragged_eofs=False))

        def ask(request: bytes) -> bytes:
            connection = connect()
            with suppress(ConnectionError, ssl.SSLError):
                connection.sendall(request)
            answer = b""
            with suppress(ConnectionError, ssl.SSLError):
                while data := connection.recv(64 * KIB):
                    answer += data
            return answer

        body = os.urandom(MIB)
        answer = ask(post(MIB, b"connection: close") + body)
        assert hashlib.sha256(body).hexdigest().encode() in answer
        num_fds = server.num_fds()
        refused(ask(GET + b"a: " + b"x" * 64 * KIB + b"\r\n\r\n"), 431)
        refused(ask(CHUNKED + chunk(b"x" * MIB) * 5), 413)
        refused(ask(GET), 408)
        # Neither a handshake that does not come to an end nor a deaf reader keeps its place.
        deaf = connect(receive_bytes=4 * KIB)
        deaf.sendall(b"GET /flood HTTP/1.1\r\n\r\n")
        silent = [stack.enter_context(server.connect()) for _ in range(19)]
        assert read_all(stack.enter_context(server.connect())) == b""
        assert [read_all(each) for each in silent] == [b""] * 19
        wait_for(lambda: server.num_fds() <= num_fds, "descriptors back to start")
        live = connect()
        live.sendall(b"GET /stream?n=20&every_ms=50 HTTP/1.1\r\n\r\n")
        assert live.recv(15) == b"HTTP/1.1 200 OK"
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ssl.SSLZeroReturnError):
            while b"[DONE]" not in live.recv(4 * KIB):
                pass
            while live.recv(4 * KIB):
                pass
            raise ssl.SSLZeroReturnError
        live.close()
        assert server.end() == 0


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        (CERTIFICATE, OTHER_KEY, "the key is not the certificate's"),
        (CERTIFICATE, ENCRYPTED_KEY, "encrypted"),
        (CERTIFICATE, "garbage", "cannot be used for TLS"),
        ("garbage", KEY, "cannot be used for TLS"),
        (CERTIFICATE, None, "cannot be used for TLS"),
        (None, KEY, "cannot read .*No such file"),
    ],
)
def test_files_that_are_no_pair_are_one_line(
    tmp_path: Path, certificate: str | None, key: str | None, message: str
) -> None:
    paths = [tmp_path / "cert.pem", tmp_path / "key.pem"]
    for path, text in zip(paths, (certificate, key), strict=True):
        if text is not None:
            path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        tls_context(str(paths[0]), str(paths[1]) if key is not None else None)
    assert "\n" not in str(caught.value)


# --- the parts by themselves


def test_limits_are_checked_and_follow_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="linger_s must be above 0"):
            TransportLimits(linger_s=bad)
    with pytest.raises(InputError, match="must not be above max_unfinished_bodies_bytes"):
        TransportLimits(max_body_bytes=2**30)
    wanted = {64: 16, 256: 64, 1024: 768, 10**6: 4096, resource.RLIM_INFINITY: 4096}
    for descriptors, num in wanted.items():
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=descriptors: (found, found))
        assert TransportLimits().num_connections() == num
        assert TransportLimits().num_connections_per_client() == num * 3 // 4
    assert TransportLimits(max_connections=7).num_connections() == 7
    assert TransportLimits(max_connections_per_client=3).num_connections_per_client() == 3


def test_a_meter_starts_anew_with_each_request() -> None:
    limits = TransportLimits(max_num_headers=2, max_body_bytes=3)
    meter = RequestMeter(limits)
    for _ in range(3):
        meter.begin()
        meter.feed(50)
        meter.header(b"a", b"b")
        meter.header(b"content-length", b"3")
        meter.headers_end()
        meter.body(3)
        assert meter.room_bytes == limits.max_headers_bytes + 1
        meter.end()
    meter.begin()
    meter.feed(meter.room_bytes)
    with pytest.raises(RefusedError, match="too large together"):
        meter.check()


def test_places_are_given_back_once_and_taken_from_the_one_that_waited_longest() -> None:
    gate = Gate(TransportLimits(max_connections=3, max_connections_per_client=2, evict_after_s=1.0))
    evicted: list[str] = []

    def enter(host: str, now_s: float) -> Any:
        return gate.enter(host, lambda: evicted.append(f"{host} {now_s}"), now_s)

    first, second = enter("a", 0.0), enter("a", 0.1)
    assert enter("a", 0.2) is None
    first.work()
    assert enter("a", 1.05) is None
    assert enter("b", 1.05) is not None
    third = enter("a", 1.2)
    assert third is not None
    assert evicted == ["a 0.1"]
    second.leave()
    assert enter("c", 1.3) is None
    first.wait(1.4)
    assert enter("c", 2.2) is not None
    assert evicted == ["a 0.1", "b 1.05"]
    for place in (first, first, third):
        place.leave()
    assert enter("a", 2.3) is not None
    assert enter("", 2.3) is not None
    assert enter("", 2.3) is None


def test_an_address_stands_for_whoever_has_it() -> None:
    assert client_of("10.1.2.3") == "10.1.2.3"
    assert client_of("::ffff:10.1.2.3") == "10.1.2.3"
    assert client_of("2001:db8:1:2:3::1") == client_of("2001:db8:1:2:ffff::9")
    assert client_of("2001:db8:1:2::1") != client_of("2001:db8:1:3::1")
    assert client_of("fe80::1%eth0") == client_of("fe80::2")
    assert client_of("") == ""


def test_another_uvicorn_is_refused_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol_module, "_METHODS", ("on_header", "on_something"))
    monkeypatch.setattr(protocol_module, "_CYCLE_ATTRIBUTES", frozenset({"else"}))
    with pytest.raises(SpanwiseError, match="on_something, else of its httptools protocol"):
        protocol_module._check_uvicorn()


def test_a_body_is_sent_in_pieces() -> None:
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"abcdefg", "more_body": True})
        await send({"type": "http.response.body"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/"}
    asyncio.run(Envelope(application, 3, AccessLog(None))(scope, None, send))  # type: ignore[arg-type]
    bodies = [(message.get("body"), message.get("more_body", False)) for message in sent[1:]]
    assert bodies == [(b"abc", True), (b"def", True), (b"g", True), (b"", False)]
