"""``/health``, ``/ready`` and ``/metrics``."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import msgspec
from starlette.responses import Response

from spanwise.server.answers import json_answer
from spanwise.server.errors import ApiError, cut, not_ready
from spanwise.server.exchange import Exchange
from spanwise.server.metrics import CONTENT_TYPE, metrics_text
from spanwise.server.protocol.model import HealthStatus, RankStatus, ReadyStatus
from spanwise.server.service import Service
from spanwise.types.serving import EngineHealth


async def health(service: Service, exchange: Exchange) -> Response:
    """Whether the engine's loop and every rank's threads answer."""
    try:
        async with asyncio.timeout(service.options.health_timeout_s):
            found = await service.engine.health()
    except TimeoutError:
        found = EngineHealth(False, reason="the engine does not answer")
    if not found.healthy:
        raise _unwell(found)
    ranks = [RankStatus(*msgspec.structs.astuple(rank)) for rank in found.ranks]
    return json_answer(HealthStatus(ranks=ranks))


async def ready(service: Service, exchange: Exchange) -> Response:
    """Whether requests are taken."""
    if not service.engine.is_ready:
        raise not_ready(service.engine.phase)
    return json_answer(ReadyStatus())


async def metrics(service: Service, exchange: Exchange) -> Response:
    """What the engine has counted, for Prometheus."""
    stats, names = await service.engine.stats(), service.model_names
    return Response(metrics_text(stats, names[0]), media_type=CONTENT_TYPE)


def _unwell(found: EngineHealth) -> ApiError:
    sick = [rank.name for rank in found.ranks if not rank.healthy]
    # A reason may speak of files and machines, and everybody may ask.
    said = f"no sign of life from {', '.join(sick)}" if sick else "the engine does not run"
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, cut(said), code="unhealthy")
