"""What is added around the application: names, answers to what it leaves out, the log."""

from __future__ import annotations

import http.client
import logging
import re

import pytest
from tests.server.transport.wire import (
    CHUNKED,
    MIB,
    PATIENCE_S,
    Server,
    chunk,
    exchange,
    post,
    refused,
    wait_for,
)

from spanwise.server.transport.access_log import AccessLog


def head_of(server: Server, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*server.address, timeout=PATIENCE_S)
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
