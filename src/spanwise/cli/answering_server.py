"""Answers from a server that speaks OpenAI's protocol."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec

from spanwise.cli.answerer import Message, Reply
from spanwise.cli.answering_engine import seeded
from spanwise.cli.ctrl_c import ends_answer
from spanwise.errors import InputError, SpanwiseError
from spanwise.types.sampling import Grammar

_CONNECT_S = 10.0
_SAYS_WRONG = (400, 401, 403, 404, 413, 422)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta
    finish_reason: str | None = None


class _ErrorText(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: _ErrorText | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorText


class AnsweringServer:
    """Asks a server's chat route; ``given`` are fields of ``SamplingParams``.

    Raises InputError where no model was named and the server has not just one.
    """

    def __init__(
        self, url: str, model: str | None, api_key: str | None, given: dict[str, Any]
    ) -> None:
        self._url, self._given = url, given
        self._root = _api_root(url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Between two pieces of an answer any time may pass: Ctrl-C is the user's limit.
        timeout = httpx2.Timeout(None, connect=_CONNECT_S)
        self._client = httpx2.AsyncClient(headers=headers, timeout=timeout)
        self._runner = asyncio.Runner()
        try:
            self.model = model or self._runner.run(self._only_model())
        except BaseException:
            self.close()
            raise

    def answer(self, messages: Sequence[Message], attempt: int) -> Reply:
        """Print and give the answer, as `Answerer.answer` says."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            **_fields(seeded(self._given, attempt)),
        }
        return self._runner.run(self._stoppable(body))

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.aclose())
        self._runner.close()

    async def _only_model(self) -> str:
        async with self._said_in_one_line():
            response = await self._client.get(f"{self._root}/models")
            _check(response.status_code, response.content)
        try:
            names = [model.id for model in msgspec.json.decode(response.content, type=_Models).data]
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise InputError(f"{self._url} is no server of models; name it with --model") from None
        if len(names) != 1:
            said = f"has {', '.join(names):.300}" if names else "names no model"
            raise InputError(f"the server {said}; choose one with --model")
        return names[0]

    async def _stoppable(self, body: dict[str, Any]) -> Reply:
        """The answer, or as much of it as came before Ctrl-C; leaving it breaks the request off."""
        said: list[str] = []
        asking = asyncio.create_task(self._ask(body, said))
        loop = asyncio.get_running_loop()
        with ends_answer(lambda: loop.call_soon_threadsafe(asking.cancel)):
            await asyncio.wait((asking,))
        finish_reason = None if asking.cancelled() else asking.result()
        return Reply("".join(said), finish_reason)

    async def _ask(self, body: dict[str, Any], said: list[str]) -> str:
        """Print the pieces of an answer and add them to ``said``; why it ended."""
        async with (
            self._said_in_one_line(),
            self._client.sse(f"{self._root}/chat/completions", method="POST", json=body) as events,
        ):
            if events.response.status_code != httpx2.codes.OK:
                _check(events.response.status_code, await events.response.aread())
            async for event in events:
                if event.data == "[DONE]":
                    break
                for choice in _choices(event.data):
                    if choice.delta.content:
                        said.append(choice.delta.content)
                        sys.stdout.write(choice.delta.content)
                        sys.stdout.flush()
                    if choice.finish_reason is not None:
                        _end_line(said)
                        return choice.finish_reason
        raise SpanwiseError(f"{self._url} broke its answer off; /regenerate asks again")

    @asynccontextmanager
    async def _said_in_one_line(self) -> AsyncIterator[None]:
        try:
            yield
        except httpx2.InvalidURL as error:
            raise InputError(f"{self._url!r:.200} is no URL: {error}") from error
        except httpx2.ConnectError as error:
            raise SpanwiseError(f"{self._url} cannot be reached: {error}") from error
        except httpx2.RequestError as error:
            said = str(error) or type(error).__name__
            raise SpanwiseError(f"{self._url} broke off: {said}") from error


def _api_root(url: str) -> str:
    """The URL with ``/v1`` at its end, whether it had that or not. Raises InputError."""
    try:
        parts = urlsplit(url)
        good = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is none
        good = False
    if not good or parts.query or parts.fragment:
        raise InputError(f"a server's URL is like http://localhost:8000, got {url!r:.200}")
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def _choices(data: str) -> list[_Choice]:
    try:
        event = msgspec.json.decode(data, type=_Event)
    except msgspec.MsgspecError as error:
        raise SpanwiseError(f"the server sent what is no answer: {error}: {data:.80}") from error
    if event.error is not None:
        raise SpanwiseError(f"the server could not go on: {event.error.message}")
    return event.choices


def _end_line(said: list[str]) -> None:
    if not "".join(said[-1:]).endswith("\n"):
        print(flush=True)


def _check(status: int, body: bytes) -> None:
    """Raise what a status other than 200 says: InputError where another request would do."""
    if status == httpx2.codes.OK:
        return
    try:
        said = msgspec.json.decode(body, type=_ErrorBody).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError):
        said = body.decode(errors="replace")[:200]
    line = f"the server says {status}: {said}"
    if status in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
        line += "; give --api-key or set SPANWISE_API_KEY"
    raise (InputError if status in _SAYS_WRONG else SpanwiseError)(line)


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """Sampling fields as a request has them; a grammar goes by another name there."""
    fields = dict(given)
    grammar: Grammar | None = fields.pop("grammar", None)
    if grammar is None:
        return fields
    if grammar.kind == "json_schema":
        schema = {"name": "answer", "schema": msgspec.json.decode(grammar.text), "strict": True}
        return fields | {"response_format": {"type": "json_schema", "json_schema": schema}}
    name = {"regex": "regex", "lark": "grammar"}[grammar.kind]
    return fields | {"structured_outputs": {name: grammar.text}}
