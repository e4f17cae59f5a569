"""How many connections there may be, and several requests on one."""

from __future__ import annotations

import hashlib
import re
import resource
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from tests.server.transport.wire import (
    GET,
    QUICK,
    Server,
    exchange,
    post,
    read_all,
    read_until,
    refused,
    serving,
    streams,
    wait_for,
)

from spanwise.server.transport.limits import TransportLimits


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
