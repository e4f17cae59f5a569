"""What every refusal has to be like, whatever was wrong with the request."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
from tests.server.fakes import MODEL
from tests.server.running import PATIENCE_S, Running

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
TYPES |= {500: "server_error", 503: "overloaded_error"}
_MAX_ANSWER_BYTES = 64 << 10
_MAX_S = 0.25
_TRIES = 5  # on a busy machine the best of them counts
_SECRETS = re.compile(r"0x[0-9a-f]{6,}|Traceback|File \"|site-packages|/(?:dev|home|root|tmp|usr)/")
_NUM_CANARIES = 8


def check_refusal(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer that is one, in every respect as it should be."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert len(answer.content) <= _MAX_ANSWER_BYTES
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    for name in ("param", "code"):
        assert error[name] is None or isinstance(error[name], str)
    assert all(isinstance(x, str) and x.isprintable() for x in (error["message"],))
    assert not _SECRETS.search(error["message"]), error["message"]
    longest = max(map(len, error["message"].split("; ")))
    assert longest <= 300, longest
    if status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
    return error


def post(client: httpx2.Client, path: str, *, within_s: float = _MAX_S, **what: Any) -> Any:
    """The answer to a request, which must not take long."""
    best = PATIENCE_S
    for _ in range(_TRIES):
        begin = time.monotonic()
        answer = client.post(path, **what)
        best = min(best, time.monotonic() - begin)
        if best <= within_s:
            return answer
    raise AssertionError(f"{path} took {best:.3f} s, {within_s} s at most")


def canary(client: httpx2.Client, number: int) -> str:
    """What one fixed prompt is answered, streamed."""
    body = {"model": MODEL, "prompt": [1, 300 + number], "max_tokens": 40, "stream": True}
    return re.sub(
        r'"(?:id|created)":(?:"[^"]*"|\d+)', "", client.post("/v1/completions", json=body).text
    )


@contextmanager
def canaries(server: Running) -> Iterator[None]:
    """Eight streams all the while; what they say must not change."""
    done = threading.Event()
    with server.client() as client, ThreadPoolExecutor(_NUM_CANARIES) as pool:
        right = [canary(client, number) for number in range(_NUM_CANARIES)]

        def sing(number: int) -> int:
            num_songs = 0
            while not done.wait(0.2):
                assert canary(client, number) == right[number]
                num_songs += 1
            return num_songs

        singing = [pool.submit(sing, number) for number in range(_NUM_CANARIES)]
        try:
            yield
        finally:
            done.set()
        assert all(each.result(PATIENCE_S) > 0 for each in singing)
        assert [canary(client, number) for number in range(_NUM_CANARIES)] == right
