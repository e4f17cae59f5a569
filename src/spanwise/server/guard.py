"""What every request goes through before any route: its name, where it comes from, its key."""

from __future__ import annotations

import ipaddress
import re
from hashlib import sha256
from hmac import compare_digest
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spanwise.server.answers import error_answer
from spanwise.server.errors import ApiError
from spanwise.server.exchange import TENANT
from spanwise.server.options import ServerOptions
from spanwise.server.page.files import PAGE_PATHS
from spanwise.server.transport.notes import REQUEST_ID
from spanwise.server.transport.refusal import new_request_id

PUBLIC = frozenset({"/health", "/ready"}) | PAGE_PATHS

_REQUEST_ID_HEADER = "x-request-id"
_GOOD_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_HERE = ("localhost", "127.0.0.1", "::1")
_TENANT_CHARACTERS = 16


class Guard:
    """An ASGI application around another: refuses those who may not ask.

    Gives each request a name, its own where it brings one that is harmless, and says it in the
    answer. Sets the request's tenant, which is its key's.
    """

    def __init__(self, application: ASGIApp, options: ServerOptions) -> None:
        self._application = application
        self._digests = options.api_key_digests
        self._hosts = _allowed_hosts(options)
        self._origins = frozenset(origin.encode() for origin in options.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on what is none."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        name = _request_id(_values(scope, b"x-request-id"))
        scope[REQUEST_ID] = name

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_REQUEST_ID_HEADER] = name
            await send(message)

        try:
            self._check_origin(scope)
            scope[TENANT] = self._check_key(scope)
        except ApiError as error:
            await error_answer(error)(scope, receive, send_named)
            return
        await self._application(scope, receive, send_named)

    def _check_origin(self, scope: Scope) -> None:
        """Raise ApiError for a page of another site that speaks through somebody's browser."""
        if self._hosts is None:
            return
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or _host(hosts[0]) not in self._hosts:
            raise _forbidden("the Host of the request is not one of this server's names")
        for origin in _values(scope, b"origin"):
            is_own = origin.partition(b"://")[2] == hosts[0]
            if not is_own and not self._origins & {origin, b"*"}:
                raise _forbidden("the Origin of the request is another site; see --allowed-origin")

    def _check_key(self, scope: Scope) -> str:
        """Whose key the request has. Raises ApiError where it has none that is known."""
        if not self._digests:
            return ""
        tenant = self._tenant(_values(scope, b"authorization"))
        if tenant or scope["path"] in PUBLIC:
            return tenant
        raise ApiError(
            HTTPStatus.UNAUTHORIZED,
            "the API key is missing or wrong; send it in the header Authorization: Bearer ...",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _tenant(self, values: list[bytes]) -> str:
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        given = sha256(key.strip()).digest()
        found = ""
        # All of them, so that the time tells nothing.
        for digest in self._digests:
            if compare_digest(given, digest):
                found = digest.hex()[:_TENANT_CHARACTERS]
        return found if scheme.lower() == b"bearer" else ""


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _allowed_hosts(options: ServerOptions) -> frozenset[str] | None:
    """Names of the server; None where any will do."""
    named = {host.lower() for host in options.allowed_hosts}
    if is_loopback(options.host):
        return frozenset({*_HERE, options.host.lower(), *named})
    return frozenset({options.host.lower(), *named}) if named else None


def _host(value: bytes) -> str:
    """The name in a Host header, without the port; "" where there is none."""
    try:
        return urlsplit(f"//{value.decode('ascii')}").hostname or ""
    except ValueError:
        return ""


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _request_id(given: list[bytes]) -> str:
    if len(given) == 1 and _GOOD_REQUEST_ID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return new_request_id()


def _forbidden(message: str) -> ApiError:
    return ApiError(HTTPStatus.FORBIDDEN, message, code="forbidden")
