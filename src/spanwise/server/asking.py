"""What the routes that generate text ask of the engine, in common."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from starlette.responses import Response

from spanwise.errors import SpanwiseError
from spanwise.server import sse
from spanwise.server.answers import EventStream, json_answer
from spanwise.server.errors import ErrorAnswer, api_error, bad_request
from spanwise.server.exchange import Exchange
from spanwise.server.generation import Generation
from spanwise.server.protocol.prompts import OnePrompt
from spanwise.server.protocol.sampling import RequestFields, SamplingFields
from spanwise.server.protocol.usage import PromptTokensDetails, Usage
from spanwise.server.service import Service
from spanwise.types.resume import Resume
from spanwise.types.sampling import SamplingParams
from spanwise.types.serving import EngineRequest


def sampling_params(service: Service, body: SamplingFields, **others: Any) -> SamplingParams:
    """How an answer is sampled; ``others`` are fields that the APIs name differently.

    Raises ApiError for what this model cannot do, and InputError.
    """
    longest = service.plan.max_model_len
    if (body.min_tokens or 0) > longest:
        raise bad_request(
            f"min_tokens is {body.min_tokens}, but the model's context is {longest}; lower it",
            "min_tokens",
        )
    params = body.sampled() | others
    service.check_known(params.get("logit_bias", ()), "logit_bias")
    service.check_known(params.get("stop_token_ids", ()), "stop_token_ids")
    return SamplingParams(**params)


def engine_request(
    service: Service, exchange: Exchange, body: RequestFields, params: SamplingParams
) -> EngineRequest:
    """A request that has everything but its prompt."""
    return EngineRequest(
        prompt="",
        params=params,
        priority=body.priority or 0,
        timeout_s=service.options.queue_timeout_s,
        tenant=exchange.tenant,
        cache_salt=body.cache_salt or "",
    )


async def open_generation(
    service: Service,
    exchange: Exchange,
    requests: Sequence[EngineRequest],
    resume: Resume | None = None,
) -> Generation:
    """Queue requests; see ``Generation.open``. Raises OverloadedError, InputError, EngineError."""
    if service.options.log_prompts:
        exchange.notes.prompts += [_said(request.prompt) for request in requests]
    return await Generation.open(service.engine, requests, exchange.notes, resume)


def _said(prompt: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A prompt without its template, which is the same for all."""
    if isinstance(prompt, str):
        return prompt
    return {name: value for name, value in prompt.items() if name != "chat_template"}


def engine_prompt(prompt: OnePrompt, add_special_tokens: bool | None) -> dict[str, Any]:
    """A prompt as the engine takes it."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "add_special_tokens": add_special_tokens}
    return {"prompt_token_ids": prompt}


async def check_prompts(service: Service, prompts: list[OnePrompt], param: str) -> None:
    """Raise ApiError for token ids that are none, and for texts that are much too long."""
    for place, prompt in enumerate(prompts):
        where = f"{param}[{place}]" if len(prompts) > 1 else param
        if isinstance(prompt, str):
            await service.check_length(len(prompt), where)
        else:
            service.check_ids(prompt, where)


def usage_of(generation: Generation, num_output_tokens: int | None = None) -> Usage:
    """What it took so far; ``num_output_tokens`` where not all of them are shown."""
    num_prompt = generation.num_prompt_tokens
    if num_output_tokens is None:
        num_output_tokens = generation.num_output_tokens
    return Usage(
        num_prompt,
        num_output_tokens,
        num_prompt + num_output_tokens,
        PromptTokensDetails(generation.num_cached_tokens),
    )


class Answer(Protocol):
    """The answer to a request; one of its methods is used, once."""

    async def whole(self) -> msgspec.Struct:
        """Wait for all of it."""

    def events(self) -> AsyncGenerator[bytes]:
        """The events as they come."""


async def give(
    exchange: Exchange,
    generation: Generation,
    answer: Answer,
    *,
    stream: bool,
    error_event: Callable[[SpanwiseError], bytes],
) -> Response:
    """Give an answer, in events or whole."""
    response: Response
    if stream:
        response = await EventStream.begin(
            answer.events(),
            abort=generation.abort,
            error_event=error_event,
            runs_on=exchange.resume is not None,
        )
    else:
        response = json_answer(await answer.whole())
    if generation.is_replayed:
        response.headers["idempotency-replayed"] = "true"
    return response


def error_event(service: Service, exchange: Exchange) -> Callable[[SpanwiseError], bytes]:
    """What makes the last event of a stream that ends with an error."""

    def event(error: SpanwiseError) -> bytes:
        detail = api_error(error, exchange.request_id, service.engine).detail
        return sse.event(ErrorAnswer(detail))

    return event
