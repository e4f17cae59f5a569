"""``/v1/embeddings``."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import Sequence
from contextlib import aclosing

import msgspec
from starlette.responses import Response

from spanwise.server.answers import json_answer
from spanwise.server.asking import (
    check_prompts,
    engine_prompt,
    engine_request,
    open_generation,
)
from spanwise.server.errors import timed_out
from spanwise.server.exchange import Exchange
from spanwise.server.protocol.embedding import EmbeddingRequest
from spanwise.server.protocol.embedding_answer import Embedding, Embeddings
from spanwise.server.protocol.prompts import each_prompt
from spanwise.server.protocol.usage import EmbeddingUsage
from spanwise.server.service import Service
from spanwise.types.plan import TaskKind
from spanwise.types.sampling import SamplingParams
from spanwise.types.serving import EngineRequest

# Of one request at a time, so that it does not fill the queue alone.
_NUM_AT_ONCE = 64
_TASKS: dict[str, TaskKind] = {"last": "pool_last", "mean": "pool_mean"}


async def embeddings(service: Service, exchange: Exchange) -> Response:
    """Make vectors of texts."""
    body = await exchange.read(EmbeddingRequest)
    service.check_model(body.model)
    return await exchange.unless_gone(_answer(service, exchange, body))


async def _answer(service: Service, exchange: Exchange, body: EmbeddingRequest) -> Response:
    inputs = each_prompt(body.input)
    await check_prompts(service, inputs, "input")
    template = engine_request(service, exchange, body, SamplingParams(max_tokens=1))
    template = msgspec.structs.replace(
        template, task=_TASKS[body.pooling or service.options.pooling]
    )
    room = asyncio.Semaphore(_NUM_AT_ONCE)

    async def embed(request: EngineRequest) -> tuple[Sequence[float], int]:
        async with room:
            return await _vector(service, exchange, request)

    work = [
        asyncio.create_task(
            embed(
                msgspec.structs.replace(
                    template,
                    prompt=engine_prompt(each, body.add_special_tokens),
                    is_further=place > 0,
                )
            )
        )
        for place, each in enumerate(inputs)
    ]
    try:
        found = await asyncio.gather(*work)
    finally:
        for task in work:
            task.cancel()
    num_tokens = sum(count for _, count in found)
    return json_answer(
        Embeddings(
            data=[_embedding(i, vector, body) for i, (vector, _) in enumerate(found)],
            model=body.model,
            usage=EmbeddingUsage(num_tokens, num_tokens),
        )
    )


async def _vector(
    service: Service, exchange: Exchange, request: EngineRequest
) -> tuple[Sequence[float], int]:
    """The vector of one input, and how many tokens it has."""
    generation = await open_generation(service, exchange, [request])
    try:
        async with aclosing(generation.news()) as all_news:
            async for _, news in all_news:
                if any(delta.finish_reason == "deadline" for delta in news.deltas):
                    raise timed_out()
                if news.pooled is not None:
                    return news.pooled, generation.num_prompt_tokens
    finally:
        generation.abort()
    raise AssertionError("a pooling request ended without its vector")


def _embedding(index: int, vector: Sequence[float], body: EmbeddingRequest) -> Embedding:
    if body.normalize is not False:
        length = math.sqrt(math.fsum(x * x for x in vector))
        vector = [x / length for x in vector] if length else vector
    if body.encoding_format == "base64":
        packed = struct.pack(f"<{len(vector)}f", *vector)
        return Embedding(index=index, embedding=base64.b64encode(packed).decode())
    return Embedding(index=index, embedding=list(vector))
