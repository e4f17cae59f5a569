"""One streamed answer, read as its bytes come."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from spanwise.bench.sse import EventSplitter

OK = 200
_MAX_ERROR_BYTES = 4096
_MAX_MESSAGE = 200


class Failure(msgspec.Struct, frozen=True):
    """Why a request has no whole answer: a kind to count by, and what was said.

    ``retry_after`` is what a refusal says of when to come again.
    """

    kind: str
    message: str
    retry_after: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def has_text(self) -> bool:
        """Whether it brings something of the answer; a chat's first chunk has but the role."""
        if self.text:
            return True
        delta = self.delta
        return delta is not None and bool(
            delta.content or delta.tool_calls or delta.reasoning or delta.reasoning_content
        )


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    """The few fields that are measured; all others are passed over unread."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _ErrorText(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    error: _ErrorText


_CHUNK = msgspec.json.Decoder(_Chunk)


class Answer:
    """What has come of one answer. Times are the caller's clock, in seconds.

    ``times_s``: when each piece of text came. A piece is one chunk, of one token or of several.
    ``input_tokens`` and ``output_tokens``: the server's own count, None while it gave none.
    """

    def __init__(self) -> None:
        self.times_s = array("d")
        self.last_s: float | None = None
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self._splitter = EventSplitter()
        self._status = OK
        self._head = b""
        self._failure: Failure | None = None
        self._has_ended = False

    def feed(self, status: int, body: bytes, now: float) -> None:
        """Take the next bytes of the response's body. What is wrong with them is kept, not raised.

        All events of one piece have its time: nothing says when they would have come alone.
        """
        self._status = status
        if len(self._head) < _MAX_ERROR_BYTES and not self.times_s:
            self._head += body[:_MAX_ERROR_BYTES]
        if status == OK:
            for data in self._splitter.feed(body):
                self._read(data, now)

    def failure(self) -> Failure | None:
        """Why the answer is not whole, once the response has ended; None where it is."""
        if self._status != OK:
            return Failure(f"http {self._status}", _message(self._head))
        if self._failure is not None:
            return self._failure
        if not self.times_s:
            return Failure("no answer", _message(self._head))
        if not self._has_ended:
            return Failure("cut short", "the stream ended with neither finish_reason nor [DONE]")
        return None

    def _read(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._has_ended = True
            return
        try:
            chunk = _CHUNK.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._failure = self._failure or Failure("bad chunk", f"{error}: {data!r:.80}")
            return
        if chunk.error is not None:
            self._failure = self._failure or Failure("error event", _message(data))
        if chunk.usage is not None:
            self.input_tokens = chunk.usage.prompt_tokens
            self.output_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices or ():
            self._take(choice, now)

    def _take(self, choice: _Choice, now: float) -> None:
        if choice.has_text():
            self.times_s.append(now)
            self.last_s = now
        if choice.finish_reason is not None:
            self._has_ended = True
            if not self.times_s:  # tokens without text are an answer too
                self.times_s.append(now)
            self.last_s = now


def _message(body: bytes) -> str:
    """What an error says: the message of OpenAI's form, else the beginning of the body."""
    try:
        text = msgspec.json.decode(body, type=_ErrorBody).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:_MAX_MESSAGE] or "an empty body"
