"""Streams whose client leaves, reads slowly, or is told of a failure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fastapi import FastAPI
from tests.server.asgi import Call
from tests.server.fakes import CONTEXT, MODEL, FakeEngine

from spanwise.errors import EngineError, OverloadedError
from spanwise.server.app import create_app
from spanwise.server.options import ServerOptions

USER = {"role": "user", "content": "hi"}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [USER]},
    "/v1/completions": {"model": MODEL, "prompt": "hi", "max_tokens": 200},
    "/v1/responses": {"model": MODEL, "input": "hi"},
}
MANY = {"model": MODEL, "prompt": ["a", "b", "c"], "max_tokens": 200}
CASES = [
    *ASKED.items(),
    ("/v1/completions", MANY),
    ("/v1/embeddings", {"model": MODEL, "input": "a"}),
]
STREAMS = [case for case in CASES if case[0] != "/v1/embeddings"]
PATIENCE_S = 10.0

Test = Callable[[FakeEngine, FastAPI], Coroutine[Any, Any, None]]


def run(test: Test, **options: Any) -> None:
    async def go() -> None:
        engine = FakeEngine()
        app = create_app(engine, ServerOptions(**options))
        async with asyncio.timeout(PATIENCE_S):
            await test(engine, app)
            while engine.live:  # a task that was cancelled ends at the loop's next turn
                await asyncio.sleep(0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, others

    asyncio.run(go())


@pytest.mark.parametrize(("path", "body"), CASES)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_token(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    async def leaves(engine: FakeEngine, app: FastAPI) -> None:
        engine.holding = True
        said = body if path == "/v1/embeddings" else {**body, "stream": stream}
        call = Call(app, path, said)
        while not engine.live:
            await asyncio.sleep(0)
        call.leave()
        await call.task
        assert not engine.live and engine.num_steps == 0

    run(leaves)


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_client_that_leaves_in_the_middle(path: str, body: dict[str, Any]) -> None:
    async def leaves(engine: FakeEngine, app: FastAPI) -> None:
        call = Call(app, path, {**body, "stream": True})
        await call.until(lambda: len(call.sent) > 4)
        call.leave()
        await call.task
        assert not engine.live and not call.is_complete
        assert "[DONE]" not in call.text
        assert engine.num_steps < (600 if body is MANY else 200)

    run(leaves)


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_client_that_leaves_at_the_end(path: str, body: dict[str, Any]) -> None:
    async def leaves(engine: FakeEngine, app: FastAPI) -> None:
        call = Call(app, path, {**body, "stream": True})
        await call.until(lambda: call.is_complete)
        call.leave()
        await call.task

    run(leaves)


def test_many_clients_that_leave_at_any_moment() -> None:
    async def leave(engine: FakeEngine, app: FastAPI) -> None:
        for number in range(200):
            path, body = STREAMS[number % len(STREAMS)]
            call = Call(app, path, {**body, "stream": number % 3 > 0})
            for _ in range(number * 7 % 60):
                await asyncio.sleep(0)
            call.leave()
            await call.task

    run(leave)


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_client_that_does_not_read(path: str, body: dict[str, Any]) -> None:
    """The application waits for it, and holds no more than one piece of the stream."""

    async def reads_not(engine: FakeEngine, app: FastAPI) -> None:
        call = Call(app, path, {**body, "stream": True})
        await call.until(lambda: len(call.sent) > 3)
        call.reads.clear()
        while engine.live:
            await asyncio.sleep(0)
        num_sent = len(call.sent)
        assert num_sent < 20
        call.reads.set()
        await call.until(lambda: call.is_complete)
        # What had gathered meanwhile came in one piece for each prompt, not in hundreds.
        assert len(call.sent) - num_sent < 40
        call.leave()
        await call.task

    run(reads_not)


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_slow_and_fast_readers_get_the_same(path: str, body: dict[str, Any]) -> None:
    async def compare(engine: FakeEngine, app: FastAPI) -> None:
        texts = []
        for slow in (False, True):
            call = Call(app, path, {**body, "stream": True})
            if slow:
                await call.until(lambda call=call: len(call.sent) > 3)
                call.reads.clear()
                for _ in range(1000):
                    await asyncio.sleep(0)
                call.reads.set()
            await call.task
            texts.append(_said(call.text))
        assert texts[0] == texts[1] != {}

    run(compare)


def _said(stream: str) -> dict[int, str]:
    """The text of each choice of a stream."""
    said: dict[int, str] = {}
    for line in stream.splitlines():
        if not line.startswith("data: {"):
            continue
        data = json.loads(line.removeprefix("data: "))
        for choice in data.get("choices", ()):
            new = choice.get("text") or choice.get("delta", {}).get("content") or ""
            said[choice["index"]] = said.get(choice["index"], "") + new
        if data.get("type") == "response.output_text.delta":
            said[0] = said.get(0, "") + data["delta"]
    return said


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_an_error_after_the_beginning(path: str, body: dict[str, Any]) -> None:
    async def fails(engine: FakeEngine, app: FastAPI) -> None:
        engine.fails_after = 5
        call = Call(app, path, {**body, "stream": True, "stream_options": {}})
        await call.task
        assert call.status == 200 and call.is_complete
        *_, last = filter(None, call.text.split("\n"))
        error = json.loads(last.removeprefix("data: "))["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "server_error" and "/dev" not in error["message"]
        assert "[DONE]" not in call.text and "response.completed" not in call.text
        assert '"usage":{' not in call.text

    run(fails)


def test_an_interrupted_stream_may_be_tried_again() -> None:
    async def interrupted(engine: FakeEngine, app: FastAPI) -> None:
        engine.fails_after = 50
        engine.failure = EngineError("the server is shutting down; send it again")
        path, body = STREAMS[0]
        call = Call(app, path, {**body, "stream": True})
        await call.until(lambda: len(call.sent) > 2)
        engine.is_ready, engine.phase = False, "failed: the server is shutting down"
        await call.task
        *_, last = filter(None, call.text.split("\n"))
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "overloaded_error" and "again" in error["message"]

    run(interrupted)


@pytest.mark.parametrize(("path", "body"), CASES)
@pytest.mark.parametrize("stream", [True, False])
def test_errors_before_the_beginning_have_a_status(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    async def refused(engine: FakeEngine, app: FastAPI) -> None:
        said = body if path == "/v1/embeddings" else {**body, "stream": stream}
        for status, error in (
            (503, OverloadedError("full", 7.5)),
            (429, OverloadedError("enough", 7.5, True)),
            (500, EngineError("died at /dev/shm/x")),
        ):
            engine.refusal = error
            call = Call(app, path, said)
            await call.task
            assert call.status == status
            headers = dict(call.sent[0]["headers"])
            assert headers.get(b"retry-after") == (None if status == 500 else b"8")
        engine.refusal = None
        engine.fails_after = 0
        if path != "/v1/embeddings":
            call = Call(app, path, said)
            await call.task
            assert call.status == 500

    run(refused)


def test_one_refusal_of_many_prompts_ends_them_all() -> None:
    async def refused(engine: FakeEngine, app: FastAPI) -> None:
        engine.holding = True
        opened = engine.open

        async def open_two(request: Any) -> Any:
            if len(engine.live) == 2:
                raise OverloadedError("full", 1.0)
            return await opened(request)

        engine.open = open_two  # type: ignore[method-assign]
        call = Call(app, "/v1/completions", MANY)
        await call.task
        assert call.status == 503 and not engine.live

    run(refused)


@pytest.mark.parametrize(("path", "body"), CASES)
def test_a_request_that_waited_too_long(path: str, body: dict[str, Any]) -> None:
    async def waits(engine: FakeEngine, app: FastAPI) -> None:
        engine.is_late = True
        for stream in (False, True):
            said = body if path == "/v1/embeddings" else {**body, "stream": stream}
            call = Call(app, path, said)
            await call.task
            assert call.status == 503 and json.loads(call.text)["error"]["code"] == "queue_timeout"
            assert b"retry-after" in dict(call.sent[0]["headers"])
        assert engine.requests[0].timeout_s == 2.5

    run(waits, queue_timeout_s=2.5)


def test_an_engine_that_still_starts() -> None:
    async def starts(engine: FakeEngine, app: FastAPI) -> None:
        engine.is_ready, engine.phase = False, "loading weights"
        for path, body in CASES:
            call = Call(app, path, body)
            await call.task
            error = json.loads(call.text)["error"]
            assert call.status == 503 and error["code"] == "not_ready"
            assert "loading weights" in error["message"]

    run(starts)


def test_sixty_four_streams_at_once() -> None:
    async def stream(engine: FakeEngine, app: FastAPI) -> None:
        path, body = STREAMS[0]
        calls = [Call(app, path, {**body, "stream": True, "seed": i}) for i in range(64)]
        await asyncio.gather(*(call.task for call in calls))
        assert all(call.text.endswith("data: [DONE]\n\n") for call in calls)
        assert len({json.dumps(_said(call.text)) for call in calls}) == 64
        assert all(call.text.count("data: ") > CONTEXT / 2 for call in calls)

    run(stream)
