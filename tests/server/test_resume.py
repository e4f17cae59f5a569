"""Answers that are asked for again with the same Idempotency-Key."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx2
import psutil
import pytest
from tests.server.asgi import Call
from tests.server.contract import check_refusal
from tests.server.fakes import FakeEngine
from tests.server.running import running
from tests.server.test_streams import ASKED, CASES
from tests.support.server import DENSE, PATIENCE_S, RealServer, serving, until

from spanwise.server.app import create_app
from spanwise.server.options import ServerOptions

WINDOW_S = 5.0
REPLAYED = "idempotency-replayed"
# Without a seed, so that no two answers are equal by chance.
LONG = {"model": DENSE, "prompt": "def main(", "max_tokens": 200, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 12}
USER = {"role": "user", "content": "hi"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}
BODIES = {
    "chat": ("/v1/chat/completions", {"messages": [USER], "max_tokens": 20, "n": 2}),
    "chat logprobs": (
        "/v1/chat/completions",
        {"messages": [USER], "max_tokens": 8, "logprobs": True, "top_logprobs": 2},
    ),
    "tools": (
        "/v1/chat/completions",
        {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "max_tokens": 200},
    ),
    "several prompts": (
        "/v1/completions",
        {"prompt": ["a", "b", "c"], "max_tokens": 8, "n": 2, "echo": True, "logprobs": 1},
    ),
    "a stop string": ("/v1/completions", {"prompt": "x", "max_tokens": 200, "stop": ["e", "\n"]}),
    "responses": ("/v1/responses", {"input": "hi", "max_output_tokens": 20}),
    "responses tools": (
        "/v1/responses",
        {
            "input": "hi",
            "tools": [{"type": "function", **TOOL["function"]}],  # type: ignore[dict-item]
            "tool_choice": "required",
            "max_output_tokens": 200,
        },
    ),
}
_keys = count()


def new_key() -> str:
    return f"key {next(_keys)}"


def headers(key: str | None, api_key: str = "one") -> dict[str, str]:
    given = {"authorization": f"Bearer {api_key}"}
    return given if key is None else given | {"Idempotency-Key": key}


@dataclass
class Streamed:
    """What was read of a stream."""

    headers: httpx2.Headers
    port: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def events(self) -> list[dict[str, Any]]:
        said = [line.removeprefix("data: ") for line in self.lines if line.startswith("data: ")]
        return [json.loads(each) for each in said if each != "[DONE]"]

    @property
    def is_replayed(self) -> bool:
        return self.headers.get(REPLAYED) == "true"

    def choice(self, index: int) -> dict[str, Any]:
        """All that was said of a choice, put together; and what tells the answer from others."""
        whole: dict[str, Any] = {"text": "", "tokens": [], "logprobs": [], "end": None}
        for event in self.events:
            whole["id"], whole["created"] = event["id"], event["created"]
            for choice in event["choices"]:
                if choice["index"] == index:
                    whole["text"] += choice["text"]
                    scores = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
                    whole["tokens"] += scores["tokens"]
                    whole["logprobs"] += scores["token_logprobs"]
                    whole["end"] = choice["finish_reason"] or whole["end"]
        return whole


@contextmanager
def streaming(
    server: RealServer, body: dict[str, Any], key: str | None, api_key: str = "one"
) -> Iterator[tuple[Streamed, Iterator[str]]]:
    """A stream that has begun; it breaks where the block ends."""
    with (
        server.client() as client,
        client.stream(
            "POST", "/v1/completions", json=body | {"stream": True}, headers=headers(key, api_key)
        ) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        local = answer.extensions["network_stream"].get_extra_info("client_addr")
        lines = filter(None, answer.iter_lines())
        yield Streamed(answer.headers, int(local[1])), lines


def read(
    server: RealServer, body: dict[str, Any], key: str | None, num_lines: int | None = None
) -> Streamed:
    """Read so many events, and break the connection; None for all of them."""
    with streaming(server, body, key) as (streamed, lines):
        for line in lines:
            streamed.lines.append(line)
            if len(streamed.lines) == num_lines:
                return streamed
    assert streamed.lines[-1] == "data: [DONE]"
    return streamed


def post(
    server: RealServer, path: str, body: dict[str, Any], key: str | None, api_key: str = "one"
) -> httpx2.Response:
    with server.client() as client:
        return client.post(path, json=body, headers=headers(key, api_key))


def serves(server: RealServer, port: int) -> psutil.Process:
    """The HTTP process that has the connection of a client's port."""
    for process in server.http():
        if any(each.raddr and each.raddr.port == port for each in process.net_connections("tcp")):
            return process
    raise AssertionError(f"nobody serves port {port}")


@contextmanager
def resuming(*arguments: str) -> Iterator[RealServer]:
    with serving("--api-key", "one", "--api-key", "two", *arguments) as server:
        yield server
        assert until(lambda: server.is_idle(key="one"))
        said = server.said
        assert not any("Traceback" in line or "ERROR" in line for line in said), said


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    path, body = BODIES["tools"]
    with resuming() as server:
        # The first grammar starts a process of its own, which stays.
        assert post(server, path, {"model": DENSE} | body, None).is_success
        yield server


# --- the same answer


def test_a_broken_stream_is_given_again_whole(server: RealServer) -> None:
    key, body = new_key(), LONG | {"n": 2, "logprobs": 1}
    first = read(server, body, key, num_lines=20)
    again = read(server, body, key)
    last = read(server, body, key)
    assert not first.is_replayed and again.is_replayed and last.is_replayed
    for index in range(2):
        part, whole = first.choice(index), again.choice(index)
        assert part["end"] is None and whole["end"] == "length"
        assert len(whole["tokens"]) == len(whole["logprobs"]) == 200
        for name in ("text", "tokens", "logprobs"):
            assert whole[name][: len(part[name])] == part[name]
        assert (whole["id"], whole["created"]) == (part["id"], part["created"])
        assert last.choice(index) == whole
    assert again.choice(0)["text"] != again.choice(1)["text"]


def test_many_follow_one_answer_while_it_is_made(server: RealServer) -> None:
    key = new_key()
    prompts = server.metrics(key="one")["num_requests_running"]
    with streaming(server, LONG, key) as (first, lines):
        first.lines.append(next(lines))
        with streaming(server, LONG, key) as (second, others):
            second.lines.append(next(others))
            assert server.metrics(key="one")["num_requests_running"] == prompts + 1
            first.lines += lines
            second.lines += others
    assert first.choice(0) == second.choice(0)
    assert second.is_replayed and not first.is_replayed


@pytest.mark.parametrize("name", BODIES)
def test_whole_answers_are_the_same_byte_for_byte(server: RealServer, name: str) -> None:
    path, body = BODIES[name]
    key = new_key()
    answers = [post(server, path, {"model": DENSE} | body, key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert answers[0].content == answers[1].content
    assert [REPLAYED in answer.headers for answer in answers] == [False, True]


def test_a_client_that_leaves_before_a_whole_answer_finds_it_later(server: RealServer) -> None:
    key, before = new_key(), num_running(server)
    with pytest.raises(httpx2.TimeoutException), server.client() as client:
        client.post("/v1/completions", json=LONG, headers=headers(key), timeout=0.1)
    assert num_running(server) == before + 1, "it runs on"
    answer = post(server, "/v1/completions", LONG, key)
    assert answer.headers[REPLAYED] == "true"
    assert answer.json()["usage"]["completion_tokens"] == 200


def num_running(server: RealServer) -> float:
    return server.metrics(key="one")["num_requests_running"]


# --- an HTTP process that is gone


def test_another_http_process_goes_on_where_one_hangs_or_dies() -> None:
    arguments = ("--http-workers", "2", "--resume-window", str(WINDOW_S), "--access-log")
    with serving("--api-key", "one", *arguments) as server:
        for end in (signal.SIGSTOP, signal.SIGKILL):
            key = new_key()
            with streaming(server, LONG, key) as (first, lines):
                first.lines += [next(lines) for _ in range(3)]
                victim = serves(server, first.port)
                victim.send_signal(end)
                again = read(server, LONG, key)
                part, whole = first.choice(0), again.choice(0)
                assert whole["text"].startswith(part["text"]) and whole["end"] == "length"
                assert (part["id"], part["created"]) == (whole["id"], whole["created"])
                assert again.is_replayed
                if end == signal.SIGSTOP:
                    victim.send_signal(signal.SIGCONT)
                    first.lines += lines
                    assert first.choice(0) == whole
        assert until(lambda: len(server.http()) == 2)

        def is_made_anew() -> bool:
            return read(server, LONG, key).choice(0)["id"] != whole["id"]

        assert not is_made_anew()
        assert until(is_made_anew), "its window never passes"
        read(server, LONG | {"max_tokens": 500}, new_key(), num_lines=2)
        server.popen.terminate()
        assert server.popen.wait(PATIENCE_S) == 0
        assert any("output_tokens=500" in line for line in server.end_log()), "waited for too"


# --- other answers


def test_another_body_is_422_and_another_route_or_tenant_another_answer(
    server: RealServer,
) -> None:
    key = new_key()
    first = post(server, "/v1/completions", SHORT, key)
    for other in (SHORT | {"max_tokens": 13}, SHORT | {"stream": True}):
        error = check_refusal(post(server, "/v1/completions", other, key), 422)
        assert error["code"] == "idempotency_key_reused" and error["param"] is None
    theirs = post(server, "/v1/completions", SHORT, key, api_key="two")
    assert theirs.status_code == 200 and REPLAYED not in theirs.headers
    assert theirs.json()["id"] != first.json()["id"]
    elsewhere = post(
        server, "/v1/responses", {"model": DENSE, "input": "x", "max_output_tokens": 2}, key
    )
    assert elsewhere.status_code == 200 and REPLAYED not in elsewhere.headers
    assert post(server, "/v1/completions", SHORT, key).content == first.content


def test_what_is_refused_is_not_kept(server: RealServer) -> None:
    key = new_key()
    too_long = SHORT | {"prompt": [5] * 4000}
    check_refusal(post(server, "/v1/completions", too_long, key), 400)
    answer = post(server, "/v1/completions", SHORT, key)
    assert answer.status_code == 200 and REPLAYED not in answer.headers


def test_nothing_is_held_once_an_answer_has_ended(server: RealServer) -> None:
    """But the answer: no place in the queue, no block."""
    for _ in range(4):
        read(server, LONG, new_key(), num_lines=2)
    assert until(lambda: server.is_idle(key="one"))
    read(server, LONG | {"max_tokens": 1900}, None, num_lines=2)
    assert until(lambda: server.is_idle(key="one"), 2.0), "without a key it ends with its client"


# --- the header


@contextmanager
def fake_server(**options: Any) -> Iterator[tuple[FakeEngine, httpx2.Client]]:
    with running(ServerOptions(**options)) as server, server.client() as client:
        yield server.engine, client


def test_a_key_is_printable_and_comes_once() -> None:
    with fake_server() as (_, client):
        for path, body in [*ASKED.items(), ("/tokenize", {"prompt": "x"})]:
            for bad in ("", "x" * 256, "é", "a\tb"):
                given = {"Idempotency-Key": bad.encode("latin-1")}
                error = check_refusal(client.post(path, json=body, headers=given), 400)
                assert "Idempotency-Key" in error["message"]
                assert error["param"] == "Idempotency-Key"
            twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
            check_refusal(client.post(path, json=body, headers=twice), 400)
            for good in ("x", "x" * 255, '"quoted one"', "~!@#"):
                assert client.post(path, json=body, headers={"Idempotency-Key": good}).is_success


@pytest.mark.parametrize(("path", "body"), CASES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_only_what_can_come_again_runs_on(
    path: str, body: dict[str, Any], stream: bool, keeps: bool
) -> None:
    async def leave() -> None:
        engine = FakeEngine()
        engine.holding = True
        app = create_app(engine, ServerOptions(keeps_answers=keeps))
        is_embedding = path == "/v1/embeddings"
        said = body if is_embedding else {**body, "stream": stream}
        call = Call(app, path, said, idempotency_key="x")
        await wait_for(lambda: bool(engine.live))
        call.leave()
        if is_embedding or not keeps:
            await call.task
            assert not engine.live and engine.num_steps == 0
        else:
            engine.holding = False
            await call.task
            assert call.status == 200 and call.is_complete and not engine.live

    async def wait_for(wanted: Callable[[], bool]) -> None:
        while not wanted():
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(leave(), PATIENCE_S))
