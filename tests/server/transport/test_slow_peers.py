"""Clients that write slowly or not at all, and clients that do not read."""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import ExitStack, suppress

import pytest
from tests.server.transport.wire import (
    CHUNKED,
    GET,
    KIB,
    MIB,
    NUM_CANARIES,
    PATIENCE_S,
    QUICK,
    Server,
    canaries,
    post,
    read_all,
    read_until,
    refused,
    wait_for,
)


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


# --- row 17: slow writers


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
        assert refused(drip([connection], PATIENCE_S)[0], 408)["code"] == "request_timeout"


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
        wait_for(lambda: server.stats()["open"] <= NUM_CANARIES, "the end of the floods")
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
