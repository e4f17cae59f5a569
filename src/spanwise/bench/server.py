"""What a server says about itself before it is measured."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from spanwise.bench.answer import OK
from spanwise.bench.connection import BrokenResponseError, ConnectError, Origin
from spanwise.errors import InputError, SpanwiseError

_TIMEOUT_S = 30.0
_UNAUTHORIZED = (401, 403)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def find_model(origin: Origin, api_key: str | None) -> str:
    """The server's one model. Raises InputError where it has several, or says none."""
    status, body = await _get(origin, "/v1/models", api_key)
    if status in _UNAUTHORIZED:
        raise InputError("the server wants an API key; give --api-key or set SPANWISE_API_KEY")
    try:
        names = [model.id for model in msgspec.json.decode(body, type=_Models).data]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        names = []
    if status != OK or not names:
        raise InputError(f"GET /v1/models names no model (status {status}); name it with --model")
    if len(names) > 1:
        raise InputError(f"the server has {', '.join(names):.300}; choose one with --model")
    return names[0]


async def find_vocab_size(origin: Origin, api_key: str | None) -> int | None:
    """How many tokens its vocabulary has, where it tells."""
    status, body = await _get(origin, "/tokenizer_info", api_key)
    try:
        info = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    size = info.get("vocab_size")
    return size if status == OK and isinstance(size, int) else None


async def _get(origin: Origin, path: str, api_key: str | None) -> tuple[int, bytes]:
    status, body = 0, bytearray()

    def take(now_status: int, piece: bytes, _: float) -> None:
        nonlocal status
        status = now_status
        body.extend(piece)

    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await origin.exchange(origin.request("GET", path, api_key), take)
    except ConnectError as error:
        raise SpanwiseError(f"{origin.url} cannot be reached: {error}") from error
    except BrokenResponseError as error:
        raise SpanwiseError(f"{origin.url} does not answer as HTTP does: {error}") from error
    except TimeoutError as error:
        raise SpanwiseError(f"{origin.url} does not answer in {_TIMEOUT_S:g} s") from error
    return status, bytes(body)
