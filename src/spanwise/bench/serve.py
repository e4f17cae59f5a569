"""``spanwise bench serve``: measures a server that speaks OpenAI's protocol, from outside."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import msgspec
import uvloop

from spanwise.bench.arrivals import poisson_arrivals
from spanwise.bench.connection import Origin
from spanwise.bench.load import Load
from spanwise.bench.record import Run
from spanwise.bench.server import find_model, find_vocab_size
from spanwise.bench.settings import ServeSettings
from spanwise.bench.summary import Summary, summarize
from spanwise.bench.workload import measured_bodies, needs_vocabulary, warmup_bodies

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_PROGRESS_S = 0.5


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of which server, and what came of it."""

    settings: ServeSettings
    model: str
    vocab_size: int | None
    arrivals_s: list[float] | None
    run: Run
    summary: Summary


class Watcher(msgspec.Struct, frozen=True):
    """Who looks on: ``note`` takes lines to keep, ``progress`` twice a second one to show."""

    note: Callable[[str], None]
    progress: Callable[[str], None] | None = None


def measure(
    settings: ServeSettings,
    api_key: str | None,
    watcher: Watcher,
    lines: Sequence[Mapping[str, Any]] = (),
) -> Measurement:
    """Measure a server; Ctrl-C during the load ends it with what has been measured so far.

    ``lines``: prompts to send in place of drawn ones, as ``read_prompts`` gives them.
    Raises InputError for what cannot be asked, SpanwiseError where there is no such server.
    """
    _allow_many_connections()
    return uvloop.run(_measure(settings, api_key, watcher, lines))


async def _measure(
    settings: ServeSettings,
    api_key: str | None,
    watcher: Watcher,
    lines: Sequence[Mapping[str, Any]],
) -> Measurement:
    origin = Origin(settings.server_url)
    try:
        model = settings.model or await find_model(origin, api_key)
        vocab_size = await find_vocab_size(origin, api_key) if needs_vocabulary(settings) else None

        def requests(bodies: Sequence[bytes]) -> list[bytes]:
            path = _PATHS[settings.endpoint]
            return [origin.request("POST", path, api_key, body) for body in bodies]

        measured = requests(measured_bodies(settings, model, vocab_size, lines))
        arrivals_s = _arrivals(settings)
        warming = requests(warmup_bodies(settings, model, vocab_size))
        await _warm_up(Load(origin, warming, settings.timeout_s), len(warming), watcher)
        load = Load(origin, measured, settings.timeout_s)
        run = await _watched(load, arrivals_s, settings.concurrency, watcher)
    finally:
        origin.close()
    return Measurement(
        settings=settings,
        model=model,
        vocab_size=vocab_size,
        arrivals_s=arrivals_s,
        run=run,
        summary=summarize(run, arrivals_s, settings.goodput),
    )


def _arrivals(settings: ServeSettings) -> list[float] | None:
    if settings.request_rate is None:
        return None
    return poisson_arrivals(settings.num_requests, settings.request_rate, settings.seed)


async def _warm_up(load: Load, num_requests: int, watcher: Watcher) -> None:
    if not num_requests:
        return
    run = await load.run(None, num_requests)
    failures = [record.failure for record in run.records if record.failure is not None]
    said = (
        f"; {len(failures)} failed: {failures[0].kind}, {failures[0].message}" if failures else ""
    )
    watcher.note(f"warm-up: {num_requests} requests in {run.wall_s:.2f} s{said}")


async def _watched(
    load: Load, arrivals_s: Sequence[float] | None, concurrency: int | None, watcher: Watcher
) -> Run:
    stop = asyncio.Event()
    # Nothing made so far goes away: a collection must not walk it between two tokens.
    gc.collect()
    gc.freeze()
    with _called_on_ctrl_c(asyncio.get_running_loop(), stop.set):
        telling = asyncio.create_task(_tell(load, watcher.progress))
        try:
            return await load.run(arrivals_s, concurrency, stop)
        finally:
            telling.cancel()
            gc.unfreeze()


async def _tell(load: Load, progress: Callable[[str], None] | None) -> None:
    while progress is not None:
        await asyncio.sleep(_PROGRESS_S)
        progress(load.progress())


@contextmanager
def _called_on_ctrl_c(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> Iterator[None]:
    def call(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop)

    # Not the loop's own way, which does not give back the handler that was there before.
    before = signal.signal(signal.SIGINT, call)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _allow_many_connections() -> None:
    """Every request in flight is an open file; the usual limit of 1,024 is the shell's."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
