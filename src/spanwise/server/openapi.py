"""The API's document, made of the same records that requests are checked with."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from spanwise.server.errors import ErrorAnswer
from spanwise.server.guard import PUBLIC
from spanwise.server.protocol.strict import Strict
from spanwise.server.routes.table import ROUTES, RouteSpec
from spanwise.server.service import version

_DESCRIPTION = """\
The routes of the OpenAI API, with vLLM's fields beside OpenAI's.

A field that is null is as if it were left out. A field that is not known is refused, and so is one
that is known but would change the answer in a way that is not supported; fields that do not change
the answer are taken."""
_REFERENCE = "#/components/schemas/"
_OF_ALL = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_URI_TOO_LONG,
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
_OF_BODIES = (
    HTTPStatus.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.TOO_MANY_REQUESTS,
)
_RETRY = {
    "Retry-After": {
        "description": "Seconds after which it may be tried again.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The request runs on when its connection breaks. Sent again with the same key "
    "and the same body it is given the same answer, from its beginning.",
    "schema": {
        "type": "string",
        "minLength": 1,
        "maxLength": 255,
        "pattern": "^[!-~]([ -~]*[!-~])?$",
    },
}
_REQUEST_ID = {
    "x-request-id": {"description": "The name of the request.", "schema": {"type": "string"}}
}


def openapi_document(needs_key: bool = False) -> dict[str, Any]:
    """The document, in OpenAPI 3.2, which is the first to know events.

    ``needs_key``: of a server that lets in none without a key.
    """
    document: dict[str, Any] = {
        "openapi": "3.2.0",
        "info": {"title": "Spanwise", "version": version(), "description": _DESCRIPTION},
        "paths": {_path(route): {route.method.lower(): _operation(route)} for route in ROUTES},
        "components": {"schemas": _schemas()},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _path(route: RouteSpec) -> str:
    return route.path.replace(":path}", "}")


def _operation(route: RouteSpec) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "responses": {str(int(status)): _error(status) for status in _statuses(route)},
    }
    operation["responses"]["200"] = _good(route)
    if route.path in PUBLIC:
        operation["security"] = []
    if route.body is not None:
        content = {"application/json": {"schema": _reference(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.events:
        operation["parameters"] = [_IDEMPOTENCY_KEY]
    if "{" in route.path:
        name = route.path.partition("{")[2].partition(":")[0]
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def _statuses(route: RouteSpec) -> list[HTTPStatus]:
    statuses = [*_OF_ALL]
    if route.path not in PUBLIC:
        statuses.append(HTTPStatus.UNAUTHORIZED)
    if route.body is not None:
        statuses += _OF_BODIES
        if route.events:
            statuses.append(HTTPStatus.UNPROCESSABLE_ENTITY)
    elif "{" in route.path:
        statuses.append(HTTPStatus.NOT_FOUND)
    return sorted(statuses)


def _good(route: RouteSpec) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.answer is None:
        content["text/plain"] = {"schema": {"type": "string"}}
    else:
        content["application/json"] = {"schema": _reference(route.answer)}
    if route.events:
        content["text/event-stream"] = {"itemSchema": _event(route)}
    return {"description": "It was done.", "headers": _REQUEST_ID, "content": content}


def _event(route: RouteSpec) -> dict[str, Any]:
    """One event of a stream."""
    records = [_reference(kind) for kind in route.events if not isinstance(kind, str)]
    texts = [{"const": kind} for kind in route.events if isinstance(kind, str)]
    written = {"contentMediaType": "application/json", "contentSchema": {"anyOf": records}}
    return {
        "description": "Where stream is true.",
        "type": "object",
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string", "anyOf": [written, *texts]},
        },
        "required": ["data"],
    }


def _error(status: HTTPStatus) -> dict[str, Any]:
    retries = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    return {
        "description": status.phrase,
        "headers": {**_REQUEST_ID, **_RETRY} if retries else _REQUEST_ID,
        "content": {"application/json": {"schema": _reference(ErrorAnswer)}},
    }


def _reference(record: type) -> dict[str, str]:
    return {"$ref": f"{_REFERENCE}{record.__name__}"}


def _schemas() -> dict[str, Any]:
    bodies: list[type[Strict]] = [route.body for route in ROUTES if route.body is not None]
    _, taken = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=_REFERENCE + "{model}"
    )
    answers: set[type[msgspec.Struct]] = {ErrorAnswer}
    for route in ROUTES:
        answers |= {each for each in (route.answer, *route.events) if isinstance(each, type)}
    _, given = msgspec.json.schema_components(
        sorted(answers, key=lambda each: each.__name__), ref_template=_REFERENCE + "{name}"
    )
    clash = taken["$defs"].keys() & given.keys()
    assert not clash, f"requests and answers share the names {clash}"
    return {**taken["$defs"], **given}
