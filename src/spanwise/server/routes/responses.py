"""``/v1/responses``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from spanwise.errors import SpanwiseError
from spanwise.server.asking import engine_request, give, open_generation, sampling_params
from spanwise.server.conversation import Conversation, Plan, plan_conversation, style_of
from spanwise.server.errors import api_error
from spanwise.server.exchange import Exchange
from spanwise.server.protocol.constraint import JsonObjectFormat
from spanwise.server.protocol.messages import TemplateStyle, said
from spanwise.server.protocol.response import (
    InputCall,
    InputCallOutput,
    InputItem,
    InputMessage,
    ResponseRequest,
    ResponseTool,
    ResponseToolChoice,
    TextSchemaFormat,
)
from spanwise.server.response_answer import ResponseAnswer
from spanwise.server.service import Service
from spanwise.types.sampling import Grammar


async def responses(service: Service, exchange: Exchange) -> Response:
    """Respond to an input."""
    body = await exchange.read(ResponseRequest)
    body.check()
    service.check_model(body.model)
    return await exchange.until_done(_answer(service, exchange, body))


async def _answer(service: Service, exchange: Exchange, body: ResponseRequest) -> Response:
    plan = await _plan(service, exchange, body)
    generation = await open_generation(service, exchange, [plan.request], exchange.resume)
    answer = ResponseAnswer(service, body, plan, generation)
    return await give(
        exchange,
        generation,
        answer,
        stream=bool(body.stream),
        error_event=_error_event(service, exchange, answer),
    )


def _error_event(
    service: Service, exchange: Exchange, answer: ResponseAnswer
) -> Callable[[SpanwiseError], bytes]:
    def event(error: SpanwiseError) -> bytes:
        return answer.error_event(api_error(error, exchange.request_id, service.engine).detail)

    return event


async def _plan(service: Service, exchange: Exchange, body: ResponseRequest) -> Plan:
    template = await service.template(bool(body.tools))
    conversation = Conversation(
        messages=_messages(body, style_of(template)),
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=_tool_choice(body),
        parallel=body.parallel_tool_calls is not False,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )
    params = sampling_params(
        service,
        body,
        max_tokens=body.max_output_tokens,
        logprobs=body.wanted_logprobs,
        grammar=_constraint(body),
    )
    request = engine_request(service, exchange, body, params)
    return await plan_conversation(service, conversation, request)


def _constraint(body: ResponseRequest) -> Grammar | None:
    match body.text.format if body.text else None:
        case (JsonObjectFormat() | TextSchemaFormat()) as wanted:
            return wanted.grammar
    return None


def _tool(tool: ResponseTool) -> dict[str, Any]:
    """A function as chat requests write it."""
    function = tool.model_dump(exclude_unset=True, exclude={"type"})
    return {"type": "function", "function": function}


def _tool_choice(body: ResponseRequest) -> Any:
    choice = body.tool_choice
    if isinstance(choice, ResponseToolChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return choice if body.tools else None


# -- the conversation ----------------------------------------------------------------------------


def _messages(body: ResponseRequest, style: TemplateStyle) -> list[dict[str, Any]]:
    """The input as chat templates read it."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        _add(messages, item, style)
    return messages


def _add(messages: list[dict[str, Any]], item: InputItem, style: TemplateStyle) -> None:
    match item:
        case InputCall():
            # Calls belong to what the model said right before them.
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            call = style.call(item.call_id, item.name, item.arguments)
            messages[-1].setdefault("tool_calls", []).append(call)
        case InputCallOutput():
            output = {"role": "tool", "tool_call_id": item.call_id, "content": said(item.output)}
            messages.append(output)
        case InputMessage():
            messages.append({"role": style.role(item.role), "content": said(item.content)})
