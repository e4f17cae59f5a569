"""The application: routes behind a guard, and one form for every error."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from spanwise.errors import SpanwiseError, reason
from spanwise.server.answers import error_answer
from spanwise.server.engine import ServingEngine
from spanwise.server.errors import ApiError, api_error, clean, cut, internal_error
from spanwise.server.exchange import REQUEST_ID, ClientGoneError, Exchange
from spanwise.server.guard import Guard
from spanwise.server.openapi import openapi_document
from spanwise.server.options import ServerOptions
from spanwise.server.page.files import page_routes
from spanwise.server.routes.table import ROUTES, Handler
from spanwise.server.service import Service, version

_LOG = logging.getLogger(__name__)

# Nobody reads it: the client has closed the connection.
_CLIENT_CLOSED = 499


class App(FastAPI):
    """FastAPI, with a document that is made of the routes' own records."""

    def openapi(self) -> dict[str, Any]:
        """The API's document."""
        if self.openapi_schema is None:
            self.openapi_schema = openapi_document()
        return self.openapi_schema


def create_app(engine: ServingEngine, options: ServerOptions) -> FastAPI:
    """The server's application over an engine, which may still be starting."""
    service = Service(engine, options)
    app = App(
        title="Spanwise",
        version=version(),
        docs_url=None,  # its page would load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
    )
    for route in ROUTES:
        endpoint = _endpoint(service, route.handler)
        app.add_route(route.path, endpoint, methods=[route.method], include_in_schema=False)
    for path, page in page_routes():
        app.add_route(path, page, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(SpanwiseError, _on_error(engine))
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_mistake)
    app.add_middleware(Guard, options=options)
    return app


def _endpoint(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(service, Exchange(request, service.options.max_body_bytes))
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED)

    return endpoint


def _on_error(engine: ServingEngine) -> Callable[[Request, Exception], Response]:
    def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, SpanwiseError)
        return error_answer(api_error(error, request.scope[REQUEST_ID], engine))

    return on_error


def _on_http_error(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    where = cut(f"{request.method} {request.scope['path']}")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        said, code = f"{where} is not allowed; see Allow", "method_not_allowed"
    else:
        said, code = f"there is no {where}; GET /openapi.json says what there is", "unknown_url"
    return error_answer(ApiError(error.status_code, said, code=code, headers=error.headers))


def _on_mistake(request: Request, error: Exception) -> Response:
    """A mistake of ours; it goes on to the server's log."""
    name = clean(request.scope[REQUEST_ID])
    _LOG.error("request %s: %s", name, clean(reason(error, expected=False)))
    answer = error_answer(internal_error())
    answer.headers["x-request-id"] = name  # answered outside of the guard
    return answer
