"""Heads of requests that are too large, or none."""

from __future__ import annotations

import hashlib
import socket
import time

import pytest
from tests.server.transport.wire import (
    CHUNKED,
    GET,
    KIB,
    MIB,
    Server,
    canaries,
    chunk,
    exchange,
    post,
    read_all,
    refused,
)


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
