"""The wire as a client sees it: the server process, raw requests, and canary streams of others."""

from __future__ import annotations

import http.client
import json
import signal
import socket
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
from tests.server.transport.application import event

from spanwise.server.transport.limits import TransportLimits

KIB, MIB = 2**10, 2**20
PATIENCE_S = 30.0  # the machine may be busy
_POLL_S = 0.02
_APPLICATION = Path(__file__).with_name("application.py")

# --- the server process


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
            connection.settimeout(PATIENCE_S)
            connection.bind((source, 0))
            connection.connect(self.address)
            stack.pop_all()
        return connection

    def request(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)
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
        return self.process.wait(PATIENCE_S)


@contextmanager
def serving(log: Path, limits: TransportLimits, **options: Any) -> Iterator[Server]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        fd = listening.fileno()
        arguments = [str(fd), msgspec.json.encode(limits).decode(), json.dumps(options)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(_APPLICATION), *arguments],
                pass_fds=[fd],
                stdout=output,
                stderr=output,
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
    deadline = time.monotonic() + PATIENCE_S
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


# --- canaries: streams of others, which nothing may disturb

NUM_CANARIES = 8
_CANARY_EVENTS, _CANARY_EVERY_MS = 20, 25
_CANARY_LATE_S = 2.5
_CANARY = b"".join(map(event, range(_CANARY_EVENTS))) + b"data: [DONE]\n\n"


@contextmanager
def canaries(server: Server) -> Iterator[None]:
    """Streams before, during and after the block: whole, byte-identical and on time."""
    stop = threading.Event()
    faults: list[str] = []
    counts = [0] * NUM_CANARIES

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

    threads = [threading.Thread(target=sing, args=(index,)) for index in range(NUM_CANARIES)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: server.stats()["open"] >= NUM_CANARIES, "canaries")
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults, faults
    assert min(counts) > 0


def _listen(server: Server) -> bytes:
    connection = http.client.HTTPConnection(*server.address, timeout=PATIENCE_S)
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


def streams(server: Server, num: int, stack: ExitStack, source: str) -> list[socket.socket]:
    opened = []
    for _ in range(num):
        connection = stack.enter_context(server.connect(source))
        connection.sendall(b"GET /stream?n=10000&every_ms=50 HTTP/1.1\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        opened.append(connection)
    return opened
