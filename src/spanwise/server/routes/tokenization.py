"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from spanwise.server.answers import json_answer
from spanwise.server.conversation import Conversation, conversation_prompt, style_of
from spanwise.server.errors import bad_request
from spanwise.server.exchange import Exchange
from spanwise.server.protocol.messages import template_message
from spanwise.server.protocol.tokenization import (
    DetokenizeRequest,
    Text,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
)
from spanwise.server.protocol.tools import as_given
from spanwise.server.service import Service
from spanwise.server.token_text import TokenText
from spanwise.server.tools.tool import read_tools


async def tokenize(service: Service, exchange: Exchange) -> Response:
    """The token ids of a text or a conversation."""
    body = await exchange.read(TokenizeRequest)
    body.check()
    service.check_model(body.model)
    return await exchange.unless_gone(_tokens(service, body))


async def _tokens(service: Service, body: TokenizeRequest) -> Response:
    tokenizer = await service.tokenizer()
    token_ids = await service.engine.tokenize(await _prompt(service, body))
    texts = TokenText(tokenizer)
    return json_answer(
        Tokens(
            count=len(token_ids),
            max_model_len=service.plan.max_model_len,
            tokens=token_ids,
            token_strs=[texts.text(i) for i in token_ids] if body.return_token_strs else None,
        )
    )


async def _prompt(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    if body.messages is None:
        assert body.prompt is not None
        await service.check_length(len(body.prompt), "prompt")
        return {"prompt": body.prompt, "add_special_tokens": body.add_special_tokens}
    keys = body.template_keys(service.options.trust_request_chat_template)
    tools = None if body.tools is None else [as_given(tool) for tool in body.tools]
    read_tools(tools)  # refuses what a chat with them would be refused for
    template = body.chat_template or await service.template(bool(tools))
    style = style_of(template)
    messages = [template_message(message, style) for message in body.messages]
    conversation = Conversation(messages=messages, tools=tools, template_keys=keys)
    return await conversation_prompt(service, conversation, with_tools=bool(tools))


async def detokenize(service: Service, exchange: Exchange) -> Response:
    """The text of token ids."""
    body = await exchange.read(DetokenizeRequest)
    service.check_model(body.model)
    await service.tokenizer()
    if body.tokens:
        service.check_ids(body.tokens, "tokens")
    text = service.engine.detokenize(body.tokens, skip_special_tokens=False)
    return json_answer(Text(await exchange.unless_gone(text)))


async def tokenizer_info(service: Service, exchange: Exchange) -> Response:
    """What the tokenizer is."""
    tokenizer = await service.tokenizer()
    if not tokenizer.exists:
        raise bad_request("the model has no tokenizer")
    special = tokenizer.special_tokens
    return json_answer(
        TokenizerInfo(
            vocab_size=service.engine.vocab_size,
            max_model_len=service.plan.max_model_len,
            added_tokens=tokenizer.added_tokens,
            chat_template=await service.template(with_tools=False),
            bos_token=special.get("bos_token"),
            eos_token=special.get("eos_token"),
            pad_token=special.get("pad_token"),
            unk_token=special.get("unk_token"),
        )
    )
