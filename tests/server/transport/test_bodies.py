"""Bodies: announced, chunked, too large, unfinished, not wanted."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from tests.server.transport.wire import (
    CHUNKED,
    GET,
    KIB,
    MIB,
    QUICK,
    Server,
    canaries,
    chunk,
    exchange,
    post,
    read_all,
    read_until,
    refused,
    serving,
    wait_for,
)


@pytest.mark.parametrize("length", [4 * MIB + 1, 10**18, "0" * 5000 + str(5 * MIB)])
def test_a_body_announced_as_too_large_is_refused_at_once(
    server: Server, length: int | str
) -> None:
    assert refused(exchange(server, post(length)), 413)["code"] == "body_too_large"


def test_a_body_too_large_is_refused_on_a_connection_in_use(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(GET + b"\r\n")
        read_until(connection, b'"n": 0')
        connection.sendall(post(4 * MIB + 1))
        assert refused(read_all(connection), 413)["code"] == "body_too_large"


def test_a_body_too_large_never_takes_the_place_of_another_answer(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(post(3).replace(b"/echo", b"/later?ms=300") + b"abc" + post(10**9))
        assert read_all(connection) == b""


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
