"""The text of a conversation, by a chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spanwise.engine.time_limit import TimeIsUpError, time_limit
from spanwise.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A template's own loops may be endless, and what it makes of little may be much.
_RENDER_S = 2.0
_MAX_GROWTH = 16
_FREE_CHARACTERS = 1 << 20
# Given by apply_chat_template itself, and not for a caller to set otherwise.
_RESERVED = frozenset(
    {"conversation", "conversations", "messages", "tools", "documents", "chat_template", "tokenize"}
    | {"add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"}
    | {"padding", "truncation", "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask"}
    | {"sanitize_control_tokens", "processor_kwargs", "self"}
)
# Unicode promises that it will never be a character.
_MARK = "\ufdd0"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a conversation is to be written down.

    ``template``: another than the model's own. ``template_kwargs``: what else the template may
    read. ``continue_final_message``: the answer goes on where the last message ends; there is no
    generation prompt then.
    """

    tools: Sequence[dict[str, Any]] | None = None
    documents: Sequence[dict[str, Any]] | None = None
    template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False


@dataclass(frozen=True)
class Piece:
    """A stretch of the text; ``is_data``: it spells a special token and must not become one."""

    text: str
    is_data: bool = False


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], options: ChatOptions
) -> list[Piece]:
    """The text of a conversation in stretches, the first of them no data. Raises InputError.

    Templates run in transformers' sandbox, for two seconds at most.
    """
    if options.template is None and not tokenizer.chat_template:
        raise InputError("the model has no chat template; give a prompt instead of messages")
    if taken := sorted(_RESERVED & set(options.template_kwargs)):
        raise InputError(f"chat_template_kwargs may not set {', '.join(taken)}; leave it out")
    if options.continue_final_message and options.add_generation_prompt:
        raise InputError(
            "continue_final_message and add_generation_prompt cannot both be; turn one off"
        )
    data = _Data(tokenizer, (messages, options.tools, options.documents, options.template_kwargs))
    try:
        with time_limit(_RENDER_S):
            text = tokenizer.apply_chat_template(
                data.marked(messages),
                tools=data.marked(options.tools),
                documents=data.marked(options.documents),
                chat_template=options.template,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                tokenize=False,
                **data.marked(options.template_kwargs),
            )
    except TimeIsUpError as error:
        raise InputError(
            f"the chat template takes longer than {_RENDER_S:g} s; make it or the messages simpler"
        ) from error
    except Exception as error:  # a template may raise anything; what it says is for the user
        raise InputError(f"the chat template refuses the messages: {reason(error)}") from error
    assert isinstance(text, str)
    most = _FREE_CHARACTERS + _MAX_GROWTH * data.num_characters
    if len(text) > most:
        raise InputError(
            f"the chat template makes {len(text)} characters of {data.num_characters}; "
            f"{most} at most"
        )
    return data.pieces(text)


class _Data:
    """What the caller's texts hold, so that it can be told from what the template writes.

    Special tokens in them are put between marks, of a kind that no text of the caller has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, values: Sequence[Any]) -> None:
        texts = [text for value in values for text in _texts(value)]
        self.num_characters = sum(map(len, texts))
        self._mark = _MARK
        while any(self._mark in text for text in texts):
            self._mark += _MARK
        special = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        by_length = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, by_length)) or "(?!)")
        self._marked = re.compile(f"{self._mark}({self._special.pattern}){self._mark}")

    def marked(self, value: Any) -> Any:
        """The value, with marks around special tokens in its texts."""
        if isinstance(value, str):
            return self._special.sub(f"{self._mark}\\g<0>{self._mark}", value)
        if isinstance(value, Mapping):
            return {key: self.marked(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(each) for each in value]
        return value

    def pieces(self, text: str) -> list[Piece]:
        """The template's text in stretches, without marks."""
        if self._mark not in text:
            return [Piece(text)]
        pieces = []
        for place, stretch in enumerate(self._marked.split(text)):
            # A template may have cut texts, and left a mark alone.
            plain = stretch.replace(self._mark, "")
            if plain or not place:
                pieces.append(Piece(plain, is_data=bool(place % 2)))
        return pieces


def _texts(value: Any) -> list[str]:
    """Every text in a record, but not the names of its fields."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for each in value for text in _texts(each)]
    return []
