"""``/status``: plan, health and counts in one answer."""

from __future__ import annotations

import asyncio
import time

import msgspec
from starlette.responses import Response

from spanwise.engine.launch import EnginePlan
from spanwise.server.answers import json_answer
from spanwise.server.exchange import Exchange
from spanwise.server.protocol.model import RankStatus
from spanwise.server.service import Service, version
from spanwise.types.serving import EngineStats


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The server now.

    ``at_s`` is on a clock of the server's that only goes forward, so that two answers give rates.
    ``ranks`` come in the plan's order. What is not known while the engine is starting, or does not
    answer, is null.
    """

    version: str
    at_s: float
    phase: str
    ready: bool
    healthy: bool
    model: str | None = None
    plan: EnginePlan | None = None
    ranks: list[RankStatus] = []
    stats: EngineStats | None = None


async def status(service: Service, exchange: Exchange) -> Response:
    """All that the page shows."""
    return json_answer(await _status(service))


async def _status(service: Service) -> ServerStatus:
    engine = service.engine
    phase, at_s = engine.phase.partition(":")[0], time.monotonic()  # why it failed: in the log
    if not engine.is_ready:
        return ServerStatus(version=version(), at_s=at_s, phase=phase, ready=False, healthy=False)
    known = ServerStatus(
        version=version(),
        at_s=at_s,
        phase=phase,
        ready=True,
        healthy=False,
        model=service.model_names[0],
        # Where the model's folder lies is nobody's business.
        plan=msgspec.structs.replace(service.plan, model=service.own_name),
    )
    try:
        async with asyncio.timeout(service.options.health_timeout_s):
            health, stats = await engine.health(), await engine.stats()
    except TimeoutError:
        return known
    ranks = [RankStatus(*msgspec.structs.astuple(rank)) for rank in health.ranks]
    return msgspec.structs.replace(
        known, at_s=time.monotonic(), healthy=health.healthy, ranks=ranks, stats=stats
    )
