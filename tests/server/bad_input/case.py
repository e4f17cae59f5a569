"""One bad request, what it is answered, and the routes that take bodies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
from tests.server.contract import check_refusal
from tests.support.server import DENSE

CONTEXT = 256  # tokens of the server under test
VOCAB = 4096
KEYS = ("sk-first", "sk-Second")
MAX_BODY_BYTES = 32 << 20

USER = {"role": "user", "content": "hi"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": DENSE, "messages": [USER]},
    "/v1/completions": {"model": DENSE, "prompt": "hi"},
    "/v1/responses": {"model": DENSE, "input": "hi"},
    "/v1/embeddings": {"model": DENSE, "input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
}
CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, TOKENIZE, DETOKENIZE = BODIES
TEXT = (CHAT, COMPLETIONS, RESPONSES)
LONGEST = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens"}
FIRST = {  # the field with the prompt
    CHAT: "messages",
    COMPLETIONS: "prompt",
    RESPONSES: "input",
    EMBEDDINGS: "input",
    TOKENIZE: "prompt",
    DETOKENIZE: "tokens",
}
MAY_PASS = (200, 400)  # whichever, but nothing else
_ENDS = ("data: [DONE]\n\n", '"status":"completed"', '"status":"incomplete"')
_KEY = {"authorization": f"Bearer {KEYS[0]}"}


@dataclass(frozen=True)
class Case:
    """A request of row ``row`` of the list, and its answer.

    ``body`` is JSON, or the bytes themselves; a function makes it where it is large. ``param``
    is the field the error names; one that ends with ``*`` is only its beginning. ``says`` is in the
    error's message. An answer that is no error need only be whole.
    """

    row: int
    name: str
    path: str
    body: Any = None
    param: str | None = None
    status: int | tuple[int, ...] = 400
    code: str | None = None
    method: str = "POST"
    headers: Mapping[str, str | bytes] = field(default_factory=dict)
    has_key: bool = True
    within_s: float = 0.25
    says: str = ""

    def __str__(self) -> str:
        return f"{self.row}-{self.method} {self.path}-{self.name}"

    def ask(self, client: httpx2.Client, *, streams: bool = False) -> httpx2.Response:
        """Send it, by a client without a key."""
        body = self.body() if callable(self.body) else self.body
        if streams:
            body = {**body, "stream": True}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers: dict[str, Any] = {"content-type": "application/json"} if body is not None else {}
        headers |= _KEY if self.has_key else {}
        headers |= self.headers
        given = {name: value for name, value in headers.items() if value != ""}
        return client.request(self.method, self.path, content=body, headers=given)

    @property
    def can_stream(self) -> bool:
        """Whether the same can be asked for as a stream."""
        body = self.body() if callable(self.body) else self.body
        return self.path in TEXT and isinstance(body, dict) and "stream" not in body

    def check(self, answer: httpx2.Response) -> dict[str, Any] | None:
        """The error that is answered, in every respect as it should be; None for none."""
        allowed = (self.status,) if isinstance(self.status, int) else self.status
        assert answer.status_code in allowed, (str(self), answer.status_code, answer.text[:500])
        if answer.status_code == 200:
            streams = answer.headers["content-type"].startswith("text/event-stream")
            assert not streams or any(end in answer.text[-2000:] for end in _ENDS), answer.text
            assert '"error":{' not in answer.text
            return None
        error = check_refusal(answer, answer.status_code)
        assert answer.status_code != 405 or answer.headers["allow"], answer.headers
        assert answer.status_code != 413 or answer.headers["connection"] == "close"
        assert answer.status_code != 401 or answer.headers["www-authenticate"] == "Bearer"
        assert self.code is None or error["code"] == self.code, (str(self), error)
        assert self.says in error["message"], (str(self), error)
        if self.param is not None and self.param.endswith("*"):
            assert (error["param"] or "").startswith(self.param[:-1]), (str(self), error)
        else:
            assert error["param"] == self.param, (str(self), error)
        return error


def changed(path: str, **fields: Any) -> dict[str, Any]:
    """The route's usual body with other fields."""
    return {**BODIES[path], **fields}


def short(path: str, **fields: Any) -> dict[str, Any]:
    """The same, with an answer that soon ends."""
    return changed(path, **{LONGEST[path]: 4} if path in LONGEST else {}, **fields)


def on_each(case: Case, paths: tuple[str, ...], body: Callable[[str], Any]) -> list[Case]:
    """The case on several routes, with the body that each takes."""
    return [replace(case, path=path, body=body(path)) for path in paths]


def text_body(path: str, text: str) -> dict[str, Any]:
    """A body whose prompt is a text."""
    said: Any = [{**USER, "content": text}] if path == CHAT else text
    return short(path, **{FIRST[path]: said})


def named(value: Any) -> str:
    """What a value is called in the name of a case."""
    return ascii(value[:8] if isinstance(value, str | list) else value)[:40]
