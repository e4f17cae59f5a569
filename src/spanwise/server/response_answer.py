"""The answer to a request for a response, whole or in events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from typing import Any

import msgspec

from spanwise.server import sse
from spanwise.server.answer_choice import AnswerChoice, Piece
from spanwise.server.conversation import Plan
from spanwise.server.errors import ErrorDetail
from spanwise.server.generation import Generation
from spanwise.server.protocol.logprobs import TokenLogprob
from spanwise.server.protocol.response import ResponseRequest
from spanwise.server.protocol.response_answer import (
    ArgumentsDelta,
    ArgumentsDone,
    CallItem,
    ErrorEvent,
    IncompleteDetails,
    InputTokensDetails,
    Item,
    ItemEvent,
    ItemStatus,
    MessageItem,
    OutputText,
    OutputTokensDetails,
    PartEvent,
    Response,
    ResponseEvent,
    ResponseUsage,
    TextDelta,
    TextDone,
)
from spanwise.server.protocol.tools import as_given
from spanwise.server.service import Service
from spanwise.server.token_text import TokenText
from spanwise.server.tools.events import CallArguments, CallEnd, CallStart, Text, ToolEvent
from spanwise.types.resume import AnswerName

Event = (
    ResponseEvent | ItemEvent | PartEvent | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone
)


@dataclass
class _Message:
    """A message that is being written."""

    id: str
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def item(self, status: ItemStatus) -> MessageItem:
        return MessageItem(id=self.id, status=status, content=[self.part()])

    def part(self) -> OutputText:
        return OutputText(text=self.text, logprobs=list(self.logprobs))


@dataclass
class _Call:
    """A call that is being written."""

    id: str
    call_id: str
    name: str
    arguments: str = ""

    def item(self, status: ItemStatus) -> CallItem:
        return CallItem(
            id=self.id,
            call_id=self.call_id,
            name=self.name,
            arguments=self.arguments,
            status=status,
        )


class ResponseAnswer:
    """One response. Use ``whole`` or ``events``, once."""

    def __init__(
        self, service: Service, body: ResponseRequest, plan: Plan, generation: Generation
    ) -> None:
        tokenizer, use = service.engine.tokenizer, plan.tools
        self._generation, self._wants_logprobs = generation, body.wanted_logprobs is not None
        self._head = _head(body, generation.name)
        thinking = use is not None and use.is_thinking(
            tokenizer, generation.streams[0].prompt_token_ids
        )
        self._choice = AnswerChoice(0, plan.parser(self._head.id, thinking))
        self._tokens = TokenText(tokenizer)
        self._numbers = count()
        self._done: list[Item] = []
        self._open: _Message | _Call | None = None
        self._end: ItemStatus = "completed"
        self._untold: list[TokenLogprob] = []

    async def whole(self) -> Response:
        """Wait for all of it. Raises what ends it early."""
        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    for _ in self._take(piece):
                        continue
        finally:
            self._generation.abort()
        return self._response()

    async def events(self) -> AsyncGenerator[bytes]:
        """The events as they come, those of one step together. Raises what ends it early."""
        begun = False
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                events = [] if begun else [*self._beginning()]
                begun = True
                events += self._take(piece)
                if events:
                    yield b"".join(map(_encode, events))
        kind = "response.completed" if self._end == "completed" else "response.incomplete"
        yield _encode(self._event(kind, self._response()))

    def error_event(self, detail: ErrorDetail) -> bytes:
        """The last event of a response that ends with an error."""
        event = ErrorEvent(
            sequence_number=next(self._numbers),
            code=detail.code,
            message=detail.message,
            param=detail.param,
            error=msgspec.structs.asdict(detail),
        )
        return sse.named_event(event.type, event)

    async def _pieces(self) -> AsyncGenerator[Piece]:
        """Pieces until the answer has ended, which may be before the engine's end."""
        async with aclosing(self._generation.news()) as all_news:
            async for _, news in all_news:
                for delta in news.deltas:
                    if (piece := self._choice.take(delta)) is not None:
                        yield piece
                if self._choice.has_ended:
                    self._generation.end()
                    return

    def _response(self) -> Response:
        """The response at its end."""
        num_prompt, num_output = (
            self._generation.num_prompt_tokens,
            self._generation.num_output_tokens,
        )
        incomplete = self._end == "incomplete"
        return msgspec.structs.replace(
            self._head,
            completed_at=None if incomplete else self._generation.heard_at,
            status="incomplete" if incomplete else "completed",
            incomplete_details=IncompleteDetails("max_output_tokens") if incomplete else None,
            output=list(self._done),
            usage=ResponseUsage(
                num_prompt,
                InputTokensDetails(self._generation.num_cached_tokens),
                num_output,
                OutputTokensDetails(),
                num_prompt + num_output,
            ),
        )

    def _beginning(self) -> Iterator[Event]:
        yield self._event("response.created", self._head)
        yield self._event("response.in_progress", self._head)

    def _event(self, kind: Any, response: Response) -> ResponseEvent:
        return ResponseEvent(type=kind, sequence_number=next(self._numbers), response=response)

    # -- items -----------------------------------------------------------------------------------

    def _take(self, piece: Piece) -> Iterator[Event]:
        """Take what is new, and give the events that tell of it."""
        if self._wants_logprobs:
            self._untold += self._tokens.chat(piece.logprobs)
        for event in piece.events:
            yield from self._tell(event)
        if piece.end is not None:
            self._end = "incomplete" if piece.end == "length" else "completed"
            if self._open is None and not self._done:
                yield from self._open_message()  # an empty answer is one too
            yield from self._close(self._end)

    def _tell(self, event: ToolEvent) -> Iterator[Event]:
        match event:
            case Text(text):
                yield from self._write(text)
            case CallStart(_, call_id, name):
                yield from self._close("completed")
                self._open = _Call(self._item_id("fc"), call_id, name)
                yield self._item_event("response.output_item.added", "in_progress")
            case CallArguments(_, fragment):
                assert isinstance(self._open, _Call)
                self._open.arguments += fragment
                yield ArgumentsDelta(
                    sequence_number=next(self._numbers),
                    item_id=self._open.id,
                    output_index=len(self._done),
                    delta=fragment,
                )
            case CallEnd():
                yield from self._close("completed")
                self._untold.clear()

    def _write(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, _Message):
            yield from self._close("completed")
            yield from self._open_message()
        assert isinstance(self._open, _Message)
        # Tokens may have come before their text.
        logprobs, self._untold = self._untold, []
        self._open.text += text
        self._open.logprobs += logprobs
        yield TextDelta(
            sequence_number=next(self._numbers),
            item_id=self._open.id,
            output_index=len(self._done),
            delta=text,
            logprobs=logprobs,
        )

    def _open_message(self) -> Iterator[Event]:
        self._open = message = _Message(self._item_id("msg"))
        empty = MessageItem(id=message.id, status="in_progress", content=[])
        yield ItemEvent(
            type="response.output_item.added",
            sequence_number=next(self._numbers),
            output_index=len(self._done),
            item=empty,
        )
        yield self._part_event("response.content_part.added", message)

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        """End the item that is being written, if any."""
        place = len(self._done)
        match self._open:
            case None:
                return
            case _Message() as message:
                message.logprobs += self._untold
                self._untold = []
                yield TextDone(
                    sequence_number=next(self._numbers),
                    item_id=message.id,
                    output_index=place,
                    text=message.text,
                    logprobs=message.logprobs,
                )
                yield self._part_event("response.content_part.done", message)
            case _Call() as call:
                yield ArgumentsDone(
                    sequence_number=next(self._numbers),
                    item_id=call.id,
                    output_index=place,
                    name=call.name,
                    arguments=call.arguments,
                )
        yield self._item_event("response.output_item.done", status)
        self._done.append(self._open.item(status))
        self._open = None

    def _item_id(self, kind: str) -> str:
        """The id of the item that comes next: the same again when the answer is replayed."""
        place = f"{self._head.id}\0{len(self._done)}"
        return f"{kind}_{sha256(place.encode()).hexdigest()[:32]}"

    def _item_event(self, kind: Any, status: ItemStatus) -> ItemEvent:
        assert self._open is not None
        return ItemEvent(
            type=kind,
            sequence_number=next(self._numbers),
            output_index=len(self._done),
            item=self._open.item(status),
        )

    def _part_event(self, kind: Any, message: _Message) -> PartEvent:
        return PartEvent(
            type=kind,
            sequence_number=next(self._numbers),
            item_id=message.id,
            output_index=len(self._done),
            part=message.part(),
        )


def _encode(event: Event) -> bytes:
    return sse.named_event(event.type, event)


def _head(body: ResponseRequest, name: AnswerName) -> Response:
    """The response before anything of it has come: what was asked for."""
    config = body.text
    wanted = None if config is None or config.format is None else config.format
    text = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True)
    reasoning = body.reasoning
    return Response(
        id=f"resp_{name.id}",
        created_at=name.created,
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=body.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": reasoning.effort if reasoning else None, "summary": None},
        safety_identifier=body.safety_identifier,
        temperature=body.temperature,
        text={"format": text, "verbosity": "medium"},
        tool_choice=as_given(body.tool_choice) or "auto",
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
        user=body.user,
    )
