"""Rows 88, 90, 91 and 95: requests of others, a full queue, and an engine that still starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.server.bad_input.case import BODIES, COMPLETIONS, KEYS, TEXT, short
from tests.server.contract import check_refusal, unharmed
from tests.support.server import DENSE, RealServer, serving, until

ENGINE_ROUTES = (*TEXT, "/v1/embeddings")
_QUEUE_TIMEOUT_S = 0.5
_TRIES = 5


def test_row_88_nobody_ends_the_requests_of_others(server: RealServer) -> None:
    """There is no route that does; a name that another has given its request is one's own."""
    with unharmed(server, KEYS[0]):
        stream = server.stream(
            {"prompt": "def main(", "max_tokens": 60, "ignore_eos": True}, key=KEYS[0]
        )
        assert stream.has_begun.wait()
        name = stream.events[0]["id"]
        for key in KEYS:
            with server.client(key) as client:
                for path in (f"/v1/responses/{name}", f"/v1/completions/{name}", "/v1/responses/x"):
                    check_refusal(client.delete(path), 404)
                    check_refusal(client.get(path), 404)
                    check_refusal(client.post(f"{path}/cancel"), 404)
                check_refusal(client.post("/abort_requests", json={"request_ids": [name]}), 404)
        assert stream.finish().is_done


@pytest.mark.parametrize("path", TEXT)
def test_row_88_a_name_is_of_one_key_alone(server: RealServer, path: str) -> None:
    answers = []
    for key in KEYS:
        with server.client(key) as client:
            body = short(path) | ({"temperature": 1.0} if path != "/v1/responses" else {})
            answer = client.post(path, json=body, headers={"idempotency-key": "the-same"})
            answers.append(answer.raise_for_status().json()["id"])
    assert len(set(answers)) == len(KEYS)


# --- a small server: one sequence at a time, two that wait, and not for long


class Small:
    """The server, and what was answered while it started."""

    def __init__(self, server: RealServer) -> None:
        self.server = server
        with server.client() as client:
            self.early = {path: client.post(path, json=body) for path, body in BODIES.items()}
        server.wait_ready()


@pytest.fixture(scope="module")
def small() -> Iterator[Small]:
    limits = ("--max-num-seqs", "1", "--max-waiting-requests", "2")
    with serving(*limits, "--queue-timeout", str(_QUEUE_TIMEOUT_S), ready=False) as server:
        yield Small(server)


@pytest.mark.parametrize("path", BODIES)
def test_row_95_while_it_loads(small: Small, path: str) -> None:
    error = check_refusal(small.early[path], 503)
    assert error["code"] == "not_ready"


@contextmanager
def busy(server: RealServer) -> Iterator[None]:
    """Somebody's stream runs, longer than the block takes."""
    body = {"model": DENSE, "prompt": "def main(", "max_tokens": 1900, "ignore_eos": True}
    with (
        server.client() as client,
        client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        yield
        next(lines)
        assert server.metrics()["num_requests_running"] == 1
    assert until(server.is_idle)


@pytest.mark.parametrize("path", ENGINE_ROUTES)
def test_row_91_the_time_is_up_before_the_first_step(small: Small, path: str) -> None:
    with busy(small.server), small.server.client() as client:
        for streams in (False, True) if path in TEXT else (False,):
            began_s = time.monotonic()
            body = short(path) | ({"stream": True} if streams else {})
            error = check_refusal(client.post(path, json=body), 503)
            assert error["code"] == "queue_timeout"
            assert time.monotonic() - began_s > 0.9 * _QUEUE_TIMEOUT_S


def test_row_90_the_queue_is_full(small: Small) -> None:
    server = small.server
    body = {"prompt": "def main(", "max_tokens": 1}
    with busy(server):
        for path in ENGINE_ROUTES:
            codes = []
            for _ in range(_TRIES):  # those that wait may give up too early, on a busy machine
                waiting = [server.stream(body) for _ in range(2)]
                with server.client() as client:
                    until(lambda: server.metrics()["num_requests_waiting"] == 2, _QUEUE_TIMEOUT_S)
                    codes.append(check_refusal(client.post(path, json=short(path)), 503)["code"])
                assert [each.finish().status for each in waiting] == [503, 503]
                if codes[-1] == "overloaded":
                    break
            assert codes[-1] == "overloaded", codes
