"""The answer to a chat request, whole or in events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from spanwise.server import sse
from spanwise.server.answer_choice import AnswerChoice, AnswerEnd, Piece
from spanwise.server.asking import usage_of
from spanwise.server.conversation import Plan
from spanwise.server.generation import Generation
from spanwise.server.protocol.chat import ChatRequest
from spanwise.server.protocol.chat_answer import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChoiceDelta,
    FunctionCall,
    FunctionCallDelta,
    MessageDelta,
    ToolCall,
    ToolCallDelta,
)
from spanwise.server.protocol.logprobs import ChatLogprobs
from spanwise.server.protocol.usage import Usage
from spanwise.server.service import Service
from spanwise.server.token_text import TokenText
from spanwise.server.tools.events import CallArguments, CallStart, Text, ToolEvent
from spanwise.types.plan import TokenLogprobs
from spanwise.types.serving import RequestNews

_BEGIN = MessageDelta(role="assistant", content="", refusal=None)
_BEGIN_CALL = MessageDelta(role="assistant", content=None, refusal=None)


class ChatAnswer:
    """One answer. Use ``whole`` or ``events``, once."""

    def __init__(
        self, service: Service, body: ChatRequest, plan: Plan, generation: Generation
    ) -> None:
        tokenizer = service.engine.tokenizer
        self._body, self._generation = body, generation
        self._id, self._created = f"chatcmpl-{generation.name.id}", generation.name.created
        self._model, self._fingerprint = body.model, service.fingerprint
        self._tokens = TokenText(tokenizer, bool(body.return_tokens_as_token_ids))
        use, self._prompt = plan.tools, generation.streams[0].prompt_token_ids
        thinking = use is not None and use.is_thinking(tokenizer, self._prompt)
        named = use is not None and use.choice.mode == "named"
        self._choices = [
            AnswerChoice(index, plan.parser(f"{self._id}-{index}", thinking), named)
            for index in range(body.n or 1)
        ]
        self._begun: set[int] = set()

    async def whole(self) -> ChatCompletion:
        """Wait for all of it. Raises what ends it early."""
        gathered = [_Gathered() for _ in self._choices]
        scored: list[TokenLogprobs | None] = []
        try:
            async with aclosing(self._news()) as all_news:
                async for news in all_news:
                    scored += news.prompt_logprobs
                    for index, piece in self._pieces(news):
                        gathered[index].take(piece)
        finally:
            self._generation.abort()
        wants_scores, wants_ids = self._body.prompt_logprobs is not None, self._wants_ids
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(*each) for each in enumerate(gathered)],
            usage=usage_of(self._generation),
            system_fingerprint=self._fingerprint,
            prompt_logprobs=self._tokens.prompt(scored) if wants_scores else UNSET,
            prompt_token_ids=list(self._prompt) if wants_ids else UNSET,
        )

    async def events(self) -> AsyncGenerator[bytes]:
        """The events as they come, those of one step together. Raises what ends it early."""
        async with aclosing(self._news()) as all_news:
            async for news in all_news:
                chunks = [self._chunk(each) for each in self._deltas(news)]
                if chunks:
                    yield b"".join(map(sse.event, chunks))
        if self._body.includes_usage:
            yield sse.event(self._chunk(None, usage_of(self._generation))) + sse.DONE
        else:
            yield sse.DONE

    async def _news(self) -> AsyncGenerator[RequestNews]:
        """News until all choices have ended, which may be before the engine's end."""
        async with aclosing(self._generation.news()) as all_news:
            async for _, news in all_news:
                yield news
                if all(choice.has_ended for choice in self._choices):
                    self._generation.end()
                    return

    def _pieces(self, news: RequestNews) -> Iterator[tuple[int, Piece]]:
        for delta in news.deltas:
            if (piece := self._choices[delta.index].take(delta)) is not None:
                yield delta.index, piece

    @property
    def _wants_ids(self) -> bool:
        return bool(self._body.return_token_ids)

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        return ChatLogprobs(self._tokens.chat(entries)) if self._body.logprobs else None

    # -- whole -----------------------------------------------------------------------------------

    def _choice(self, index: int, gathered: _Gathered) -> ChatChoice:
        return ChatChoice(
            index,
            gathered.message,
            self._logprobs(gathered.logprobs),
            gathered.end,
            gathered.token_ids if self._wants_ids else UNSET,
        )

    # -- in events -------------------------------------------------------------------------------

    def _deltas(self, news: RequestNews) -> Iterator[ChoiceDelta]:
        for index, piece in self._pieces(news):
            messages = self._messages(piece)
            if not messages and piece.end is None and self._choices[index].may_call:
                continue  # whether it begins with text or a call shows later
            if index not in self._begun:
                self._begun.add(index)
                calls = bool(messages) and messages[0].tool_calls is not UNSET
                yield ChoiceDelta(index, _BEGIN_CALL if calls else _BEGIN)
            for place, message in enumerate(messages):
                # Tokens and their text need not come together: they go with the first of it.
                yield self._delta(index, message, piece if place == 0 else None)
            if piece.end is not None:
                yield ChoiceDelta(index, MessageDelta(), finish_reason=piece.end)

    def _messages(self, piece: Piece) -> list[MessageDelta]:
        messages = [delta for event in piece.events if (delta := _message(event)) is not None]
        shows_tokens = self._wants_ids or bool(self._body.logprobs)
        if not messages and piece.token_ids and shows_tokens:
            return [MessageDelta(content="")]
        return messages

    def _delta(self, index: int, message: MessageDelta, piece: Piece | None) -> ChoiceDelta:
        if piece is None or not piece.token_ids:
            return ChoiceDelta(index, message)
        token_ids = list(piece.token_ids) if self._wants_ids else UNSET
        return ChoiceDelta(index, message, self._logprobs(piece.logprobs), token_ids=token_ids)

    def _chunk(self, delta: ChoiceDelta | None, usage: Usage | None = None) -> ChatChunk:
        shown: Usage | UnsetType | None = usage if self._body.includes_usage else UNSET
        if delta is not None and self._body.includes_every_usage:
            shown = usage_of(self._generation)
        first = delta is not None and delta.delta.role is not UNSET
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=[] if delta is None else [delta],
            usage=shown,
            prompt_token_ids=list(self._prompt) if first and self._wants_ids else UNSET,
        )


@dataclass
class _Gathered:
    """A choice as far as it has come."""

    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    end: AnswerEnd = "stop"

    def take(self, piece: Piece) -> None:
        self.logprobs += piece.logprobs
        self.token_ids += piece.token_ids
        self.end = piece.end or self.end
        for event in piece.events:
            match event:
                case Text(text):
                    self.texts.append(text)
                case CallStart(_, call_id, name):
                    self.calls.append(ToolCall(call_id, FunctionCall(name, "")))
                case CallArguments(_, fragment):
                    last = self.calls.pop()
                    whole = FunctionCall(last.function.name, last.function.arguments + fragment)
                    self.calls.append(ToolCall(last.id, whole))

    @property
    def message(self) -> AnswerMessage:
        text = "".join(self.texts)
        return AnswerMessage(text or None, self.calls) if self.calls else AnswerMessage(text)


def _message(event: ToolEvent) -> MessageDelta | None:
    """The piece of a message that an event is; the end of a call is none."""
    match event:
        case Text(text):
            return MessageDelta(content=text)
        case CallStart(index, call_id, name):
            function = FunctionCallDelta(name, "")
            return MessageDelta(tool_calls=[ToolCallDelta(index, function, call_id, "function")])
        case CallArguments(index, fragment):
            function = FunctionCallDelta(arguments=fragment)
            return MessageDelta(tool_calls=[ToolCallDelta(index, function)])
    return None
