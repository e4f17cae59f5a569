"""What the server logs: each request in one line, by name, and nothing that nobody asked to see."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.server.asgi import Call
from tests.server.fakes import MODEL, FakeEngine
from tests.support.server import PATIENCE_S, command

from spanwise.errors import EngineError, InputError
from spanwise.server.app import create_app
from spanwise.server.config import HttpConfig
from spanwise.server.logs import JsonLines
from spanwise.server.options import ServerOptions, digest
from spanwise.server.transport.access_log import AccessLog
from spanwise.server.transport.envelope import Envelope

_PROMPT = "the moon is made of"
_KEY = "spoken-by-nobody"
_NASTY = "a\r\nb\x1b[31m\x7f\x85\u2028\u202e c"
_CHAT = {"messages": [{"role": "user", "content": _PROMPT}]}
_COMPLETION = {"prompt": _PROMPT, "max_tokens": 3}


async def to_its_end(call: Call) -> None:
    await call.task


def logged(
    path: str,
    body: dict[str, Any],
    engine: FakeEngine | None = None,
    client: Callable[[Call], Any] = to_its_end,
    options: ServerOptions | None = None,
    **headers: str,
) -> logging.LogRecord:
    """What is logged of one request, which ``client`` sees to."""
    records: list[logging.LogRecord] = []
    logger, handler = logging.Logger("access"), logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    app = create_app(engine or FakeEngine(), options or ServerOptions())

    async def ask() -> None:
        wrapped = Envelope(app, 1 << 16, AccessLog(logger))
        await client(Call(wrapped, path, {"model": MODEL} | body, **headers))

    asyncio.run(ask())
    (record,) = records
    return record


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    return dict(json.loads(JsonLines().format(record)))


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_with_what_came_of_it(streams: bool) -> None:
    engine = FakeEngine()
    engine.script = lambda _: "cheese"
    body = _CHAT | {"stream": streams, "n": 2}
    record = logged("/v1/chat/completions", body, engine, x_request_id="mine-1")
    facts = facts_of(record)
    (asked,) = engine.requests
    assert (facts["path"], facts["status"]) == ("/v1/chat/completions", 200)
    assert facts["request_id"] == "mine-1"
    assert facts["prompt_tokens"] > len(_PROMPT.split())
    num_tokens = len(engine.tokenizer.encode("cheese", add_special_tokens=False)) + 1
    assert facts["output_tokens"] == num_tokens * asked.params.n
    assert facts["finish_reason"] == "stop"
    assert 0 < facts["ttft_ms"] <= facts["duration_ms"]
    assert "aborted" not in facts and "prompt" not in facts
    line = record.getMessage()
    assert re.fullmatch(r"(\w+=\S+ ?)+", line) and "finish_reason=stop" in line


def test_several_prompts_are_one_request() -> None:
    facts = facts_of(logged("/v1/completions", {"prompt": [_PROMPT, "b"], "max_tokens": 3}))
    assert facts["output_tokens"] == 6 and facts["finish_reason"] == "length"
    facts = facts_of(logged("/v1/embeddings", {"input": [_PROMPT, "b"]}))
    assert facts["prompt_tokens"] > len(_PROMPT.split()) and "output_tokens" not in facts


def test_a_client_that_leaves() -> None:
    async def leave(call: Call) -> None:
        await call.until(lambda: "data" in call.text)
        call.leave()
        await call.task

    engine = FakeEngine()
    engine.script = lambda _: [300] * 200
    body = _COMPLETION | {"stream": True, "max_tokens": 200}
    record = logged("/v1/completions", body, engine, leave)
    facts = facts_of(record)
    assert facts["aborted"] is True and facts["status"] == 200
    assert facts["output_tokens"] < 200 and "finish_reason" not in facts


def test_a_request_that_is_refused() -> None:
    record = logged("/v1/completions", {"prompt": _PROMPT, "nonsense": 1}, x_request_id="a b\n")
    facts = facts_of(record)
    assert facts["status"] == 400 and facts["request_id"].startswith("req_")
    assert "prompt_tokens" not in facts


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_prompts_and_keys_are_not_logged(path: str) -> None:
    body = {"/v1/completions": _COMPLETION, "/v1/embeddings": {"input": _PROMPT}}.get(path, _CHAT)
    options = ServerOptions(api_key_digests=(digest(_KEY),))
    key = f"Bearer {_KEY}"
    record = logged(path, body, options=options, authorization=key)
    assert facts_of(record)["status"] == 200
    for line in (record.getMessage(), JsonLines().format(record)):
        assert "moon" not in line and _KEY not in line
    options = ServerOptions(api_key_digests=(digest(_KEY),), log_prompts=True)
    record = logged(path, body, options=options, authorization=key)
    assert _PROMPT in facts_of(record)["prompt"] and "moon" in record.getMessage()
    assert "{%" not in record.getMessage(), "the template is not the prompt"
    assert _KEY not in record.getMessage()


@pytest.mark.parametrize("form", [logging.Formatter("%(message)s"), JsonLines()])
def test_what_clients_write_stays_in_its_line(form: logging.Formatter) -> None:
    options = ServerOptions(log_prompts=True)
    asked = logged("/v1/completions", _COMPLETION | {"prompt": _NASTY}, options=options)
    for record in (logged(f"/{_NASTY}", {}), asked):
        line = form.format(record)
        assert line.isascii() and line.isprintable()


def test_json_gives_back_what_was_written() -> None:
    options = ServerOptions(log_prompts=True)
    asked = logged("/v1/completions", _COMPLETION | {"prompt": _NASTY}, options=options)
    assert json.loads(facts_of(asked)["prompt"])[0]["prompt"] == _NASTY
    assert facts_of(logged(f"/{_NASTY}", {}))["path"] == f"/{_NASTY}"


def test_an_error_is_one_line_too() -> None:
    try:
        raise RuntimeError(_NASTY)
    except RuntimeError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 0, "it %s", ("broke",), (type(error), error, None)
        )
    line = JsonLines().format(record)
    assert line.isascii() and line.isprintable()
    found = json.loads(line)
    assert (found["level"], found["logger"], found["message"]) == ("error", "x", "it broke")
    assert "RuntimeError" in found["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", found["time"])


def test_a_failure_names_its_request(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.refusal = EngineError(f"rank 0 died: {_NASTY}")
    answered = logged("/v1/completions", _COMPLETION, engine, x_request_id="mine-2")
    assert facts_of(answered)["status"] == 500
    (record,) = caplog.records
    found = facts_of(record)
    assert found["request_id"] == "mine-2" and "rank 0 died" in found["message"]
    assert record.getMessage().startswith("request mine-2: ")
    assert record.getMessage().isprintable()


def test_prompts_are_only_logged_where_requests_are() -> None:
    with pytest.raises(InputError, match="access_log"):
        HttpConfig(options=ServerOptions(log_prompts=True))


def test_all_that_a_server_says_is_json(tmp_path: Path) -> None:
    arguments = command(str(tmp_path), "--port", "0", "--log-format", "json")
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 2 and ended.stdout == ""
    said = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [each["level"] for each in said] == ["info", "error"]
    assert "(loading)" in said[0]["message"] and "config.json" in said[1]["message"]
