"""``/v1/chat/completions``."""

from __future__ import annotations

from starlette.responses import Response

from spanwise.server.asking import (
    engine_request,
    error_event,
    give,
    open_generation,
    sampling_params,
)
from spanwise.server.chat_answer import ChatAnswer
from spanwise.server.conversation import Conversation, Plan, plan_conversation, style_of
from spanwise.server.exchange import Exchange
from spanwise.server.protocol.chat import ChatRequest
from spanwise.server.protocol.messages import template_message
from spanwise.server.protocol.tools import as_given
from spanwise.server.service import Service


async def chat_completions(service: Service, exchange: Exchange) -> Response:
    """Answer a conversation."""
    body = await exchange.read(ChatRequest)
    body.check()
    service.check_model(body.model)
    return await exchange.until_done(_answer(service, exchange, body))


async def _answer(service: Service, exchange: Exchange, body: ChatRequest) -> Response:
    plan = await _plan(service, exchange, body)
    generation = await open_generation(service, exchange, [plan.request], exchange.resume)
    answer = ChatAnswer(service, body, plan, generation)
    return await give(
        exchange,
        generation,
        answer,
        stream=bool(body.stream),
        error_event=error_event(service, exchange),
    )


async def _plan(service: Service, exchange: Exchange, body: ChatRequest) -> Plan:
    keys = body.template_keys(service.options.trust_request_chat_template)
    template = body.chat_template or await service.template(bool(body.tools))
    style = style_of(template)
    conversation = Conversation(
        messages=[template_message(message, style) for message in body.messages],
        tools=None if body.tools is None else [as_given(tool) for tool in body.tools],
        tool_choice=as_given(body.tool_choice),
        parallel=body.parallel_tool_calls is not False,
        template_keys=keys,
        reasoning_effort=body.reasoning_effort,
        documents=body.documents,
    )
    params = sampling_params(
        service,
        body,
        n=body.n or 1,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=body.wanted_logprobs,
        prompt_logprobs=body.prompt_logprobs,
        grammar=body.constraint,
    )
    request = engine_request(service, exchange, body, params)
    return await plan_conversation(service, conversation, request)
