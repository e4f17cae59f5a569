"""The page's files: everything it needs, and nothing from another host."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

_FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
# They hold nothing secret, so they may be had without a key: it is the page that asks for it.
PAGE_PATHS = frozenset(_FILES)
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # a newer server brings a newer page
}


def page_routes() -> list[tuple[str, Callable[[Request], Awaitable[Response]]]]:
    """Each path of the page, and what answers a GET of it."""
    return [(path, partial(_serve, _read(name), kind)) for path, (name, kind) in _FILES.items()]


def _read(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


async def _serve(content: bytes, media_type: str, request: Request) -> Response:
    return Response(content, headers=_HEADERS, media_type=media_type)
