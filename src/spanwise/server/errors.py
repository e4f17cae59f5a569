"""What clients are told when something is wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus

import msgspec

from spanwise.errors import (
    ContextLengthError,
    DeviceError,
    InputError,
    KeyReusedError,
    LayoutError,
    ModelError,
    OverloadedError,
    SpanwiseError,
    reason,
)
from spanwise.server.engine import ServingEngine
from spanwise.server.limits import MAX_ECHO_CHARACTERS, MAX_ERRORS

_LOG = logging.getLogger(__name__)

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.INTERNAL_SERVER_ERROR: "server_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}
_INVALID = "invalid_request_error"
_MAX_MESSAGE = (MAX_ERRORS + 1) * (MAX_ECHO_CHARACTERS + 2)
# A start takes seconds; an engine that has failed is started anew by whoever watches it.
_RETRY_START_S = 5.0
_RETRY_QUEUE_S = 5.0
_RETRY_STATUSES = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
# These speak of the server's files and machines.
_OURS = (ModelError, LayoutError, DeviceError)


class ErrorDetail(msgspec.Struct, frozen=True):
    """One error: ``param`` is the field it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(SpanwiseError):
    """Ends a request with an error; everything in it is for the client to see."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if status in _RETRY_STATUSES:
            self.headers.setdefault("retry-after", "1")

    @property
    def detail(self) -> ErrorDetail:
        """What the body says."""
        kind = _TYPES.get(HTTPStatus(self.status), _INVALID)
        param = None if self.param is None else clean(cut(self.param))
        return ErrorDetail(clean(self.message[:_MAX_MESSAGE]), kind, param, self.code)

    def body(self) -> bytes:
        """The JSON of the answer."""
        return msgspec.json.encode(ErrorAnswer(self.detail))


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request cannot be used."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def unsupported(param: str, advice: str = "leave it out") -> ApiError:
    """The request asks for what would change the answer and is not there."""
    return bad_request(f"{param} is not supported; {advice}", param, "unsupported_parameter")


def too_long(message: str, param: str | None = None) -> ApiError:
    """The prompt does not fit the model's context."""
    return bad_request(message, param, "context_length_exceeded")


def timed_out() -> ApiError:
    """The request's first step did not begin in time."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "the request waited too long for its first step; try again later",
        code="queue_timeout",
        headers=_retry_after(_RETRY_QUEUE_S),
    )


def not_ready(phase: str) -> ApiError:
    """The engine does not take requests: its start goes on, or it has ended."""
    # Why it failed may speak of files and machines; the log says it.
    ended = phase.startswith("failed")
    said = "the engine does not run" if ended else f"the engine is not ready: {phase}"
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        f"{said}; send the request again later",
        code="engine_unavailable" if ended else "not_ready",
        headers=_retry_after(_RETRY_START_S),
    )


def several(messages: list[str]) -> str:
    """Errors as one message: the first ten, each cut."""
    more = len(messages) - MAX_ERRORS
    said = [cut(message) for message in messages[:MAX_ERRORS]]
    return "; ".join([*said, f"and {more} more"] if more > 0 else said)


def cut(text: str) -> str:
    """At most 200 characters of what a client sent."""
    return text if len(text) <= MAX_ECHO_CHARACTERS else text[: MAX_ECHO_CHARACTERS - 3] + "..."


def clean(text: str) -> str:
    """In one line, and nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def api_error(error: SpanwiseError, request_id: str, engine: ServingEngine) -> ApiError:
    """The answer to an error that a request ended with; ours are logged, and not told."""
    match error:
        case ApiError():
            return error
        case OverloadedError():
            return _overloaded(error)
        case ContextLengthError():
            return too_long(cut(reason(error)))
        case KeyReusedError():
            said, unprocessable = cut(reason(error)), HTTPStatus.UNPROCESSABLE_ENTITY
            return ApiError(unprocessable, said, code="idempotency_key_reused")
        case InputError() if not isinstance(error, _OURS):
            return bad_request(cut(reason(error)))
    log_error(error, request_id)
    if not engine.is_ready:
        return not_ready(engine.phase)
    return internal_error()


def log_error(error: Exception, request_id: str) -> None:
    """Log what is not the client's fault."""
    facts = {"request_id": clean(request_id), "message": clean(reason(error, expected=False))}
    _LOG.error("request %(request_id)s: %(message)s", facts, extra={"facts": facts})


def internal_error() -> ApiError:
    """Something that is not the client's fault."""
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "the engine failed while it worked on the request; the server's log says why",
        code="internal_error",
    )


def _overloaded(error: OverloadedError) -> ApiError:
    status = HTTPStatus.SERVICE_UNAVAILABLE
    if error.of_tenant:
        status = HTTPStatus.TOO_MANY_REQUESTS
    return ApiError(
        status,
        cut(reason(error)),
        code="rate_limit_exceeded" if error.of_tenant else "overloaded",
        headers=_retry_after(error.retry_after_s),
    )


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}
