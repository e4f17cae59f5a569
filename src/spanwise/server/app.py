"""The application: routes behind a guard, and one form for every error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from spanwise.errors import SpanwiseError
from spanwise.server.answers import error_answer
from spanwise.server.engine import ServingEngine
from spanwise.server.errors import ApiError, api_error, clean, cut, internal_error, log_error
from spanwise.server.exchange import ClientGoneError, Exchange
from spanwise.server.guard import Guard
from spanwise.server.openapi import openapi_document
from spanwise.server.options import ServerOptions
from spanwise.server.page.files import page_routes
from spanwise.server.routes.table import ROUTES, RouteSpec
from spanwise.server.service import Service, version
from spanwise.server.transport.notes import REQUEST_ID

# Nobody reads it: the client has closed the connection.
_CLIENT_CLOSED = 499


class App(FastAPI):
    """FastAPI, with a document that is made of the routes' own records."""

    def __init__(self, *, needs_key: bool) -> None:
        super().__init__(
            title="Spanwise",
            version=version(),
            docs_url=None,  # its page would load scripts from another host
            redoc_url=None,
            redirect_slashes=False,
        )
        self._needs_key = needs_key

    def openapi(self) -> dict[str, Any]:
        """The API's document."""
        if self.openapi_schema is None:
            self.openapi_schema = openapi_document(self._needs_key)
        return self.openapi_schema


def create_app(engine: ServingEngine, options: ServerOptions) -> FastAPI:
    """The server's application over an engine, which may still be starting."""
    service = Service(engine, options)
    app = App(needs_key=bool(options.api_key_digests))
    for route in ROUTES:
        endpoint = _endpoint(service, route)
        app.add_route(route.path, endpoint, methods=[route.method], include_in_schema=False)
    for path, page in page_routes():
        app.add_route(path, page, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(SpanwiseError, _on_error(engine))
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_mistake)
    app.add_middleware(Guard, options=options)
    if options.allowed_origins:
        # Around the guard: a browser asks whether it may ask without a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "idempotency-replayed"],
        )
    return app


def _endpoint(service: Service, route: RouteSpec) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        exchange = Exchange(request, service.options)
        if route.computes and not exchange.may_be_known:
            service.engine.check_room()  # before anything is read
        try:
            return await route.handler(service, exchange)
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED)

    return endpoint


def _on_error(engine: ServingEngine) -> Callable[[Request, Exception], Awaitable[Response]]:
    # Each of these handlers is a coroutine: a plain function would be run on a thread.
    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, SpanwiseError)
        return error_answer(api_error(error, request.scope[REQUEST_ID], engine))

    return on_error


async def _on_http_error(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    where = cut(f"{request.method} {request.scope['path']}")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        said, code = f"{where} is not allowed; see Allow", "method_not_allowed"
    else:
        said, code = f"there is no {where}; GET /openapi.json says what there is", "unknown_url"
    return error_answer(ApiError(error.status_code, said, code=code, headers=error.headers))


async def _on_mistake(request: Request, error: Exception) -> Response:
    """A mistake of ours; it goes on to the server's log."""
    name = clean(request.scope[REQUEST_ID])
    log_error(error, name)
    answer = error_answer(internal_error())
    answer.headers["x-request-id"] = name  # answered outside of the guard
    return answer
