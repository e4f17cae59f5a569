"""``/v1/completions``."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from spanwise.server.asking import (
    check_prompts,
    engine_prompt,
    engine_request,
    error_event,
    give,
    open_generation,
    sampling_params,
)
from spanwise.server.completion_answer import CompletionAnswer
from spanwise.server.errors import bad_request
from spanwise.server.exchange import Exchange
from spanwise.server.generation import Generation
from spanwise.server.limits import MAX_SEQUENCES
from spanwise.server.protocol.completion import CompletionRequest
from spanwise.server.protocol.prompts import OnePrompt, each_prompt
from spanwise.server.service import Service
from spanwise.types.serving import EngineRequest


async def completions(service: Service, exchange: Exchange) -> Response:
    """Complete texts."""
    body = await exchange.read(CompletionRequest)
    body.check()
    service.check_model(body.model)
    return await exchange.until_done(_answer(service, exchange, body))


async def _answer(service: Service, exchange: Exchange, body: CompletionRequest) -> Response:
    prompts = each_prompt(body.prompt)
    if len(prompts) * (body.n or 1) > MAX_SEQUENCES:
        raise bad_request(f"prompts times n must be {MAX_SEQUENCES} at most; send less", "prompt")
    await check_prompts(service, prompts, "prompt")
    template = engine_request(service, exchange, body, _params(service, body))
    requests = [_request(template, body, prompt) for prompt in prompts]
    generation = await open_generation(service, exchange, requests, exchange.resume)
    try:
        echoes = await _echoes(service, body, prompts, generation)
    except BaseException:
        generation.abort()
        raise
    answer = CompletionAnswer(service, body, generation, echoes)
    return await give(
        exchange,
        generation,
        answer,
        stream=bool(body.stream),
        error_event=error_event(service, exchange),
    )


def _params(service: Service, body: CompletionRequest) -> Any:
    scored = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        scored = max(body.logprobs, scored or 0)
    return sampling_params(
        service,
        body,
        n=body.n or 1,
        max_tokens=max(body.length, 1),  # the engine has no request without a token
        logprobs=body.logprobs,
        prompt_logprobs=scored,
        grammar=body.constraint,
    )


def _request(template: EngineRequest, body: CompletionRequest, prompt: OnePrompt) -> EngineRequest:
    return msgspec.structs.replace(template, prompt=engine_prompt(prompt, body.add_special_tokens))


async def _echoes(
    service: Service, body: CompletionRequest, prompts: list[OnePrompt], generation: Generation
) -> list[str]:
    """The texts of the prompts: as they were given, or of their tokens."""
    skip = body.skip_special_tokens is not False
    return [
        prompt
        if isinstance(prompt, str)
        else await service.engine.detokenize(prompt, skip_special_tokens=skip)
        for prompt in (prompts if body.echo else [""] * len(prompts))
    ]
