"""``/tokenize`` and ``/detokenize``: what requests may say, and the answers."""

from __future__ import annotations

from typing import Annotated

import msgspec
from pydantic import ConfigDict, Field

from spanwise.server.errors import bad_request
from spanwise.server.limits import MAX_PROMPT_TOKENS
from spanwise.server.protocol.chat import TemplateFields
from spanwise.server.protocol.messages import Messages
from spanwise.server.protocol.strict import Strict, TokenId, only_one
from spanwise.server.protocol.tools import Tools

_OF_CONVERSATIONS = (
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)


class TokenizeRequest(TemplateFields, Strict):
    """A text or a conversation, in vLLM's words."""

    model_config = ConfigDict(json_schema_extra=only_one("prompt", "messages"))

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Raise ApiError unless there is one thing to tokenize."""
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("exactly one of prompt and messages is required", "prompt")
        if self.messages is not None:
            return
        for name in _OF_CONVERSATIONS:
            if getattr(self, name) is not None:
                raise bad_request(f"{name} needs messages; leave it out", name)


class DetokenizeRequest(Strict):
    """Token ids, in vLLM's words."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_PROMPT_TOKENS)]


class Tokens(msgspec.Struct, frozen=True):
    """The answer to ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct, frozen=True):
    """The answer to ``/detokenize``."""

    prompt: str


class TokenizerInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to ``/tokenizer_info``."""

    vocab_size: int
    max_model_len: int
    added_tokens: dict[str, int]
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
