"""The engine's part of one HTTP request."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Self

import msgspec

from spanwise.errors import SpanwiseError
from spanwise.server.engine import RequestStream, ServingEngine
from spanwise.server.transport.notes import RequestNotes
from spanwise.types.resume import AnswerName, Resume
from spanwise.types.serving import EngineRequest, RequestNews

PromptNews = tuple[int, RequestNews]


def new_name() -> AnswerName:
    """The name of an answer that is asked for now."""
    return AnswerName(uuid.uuid4().hex, int(time.time()))


class Generation:
    """One engine request for each prompt, in their order.

    ``name`` is what the answer is called; ``is_replayed`` where it was asked for before.
    ``heard_at`` is when the last of it was computed (Unix time).
    """

    def __init__(
        self, streams: Sequence[RequestStream], notes: RequestNotes, name: AnswerName
    ) -> None:
        bound_to = streams[0].bound_to if streams else None
        self.name, self.is_replayed = bound_to or name, bound_to is not None
        self.streams = streams
        self.num_output_tokens = 0
        self.heard_at = self.name.created
        self._notes = notes
        self._reasons: set[str] = set()

    @classmethod
    async def open(
        cls,
        engine: ServingEngine,
        requests: Sequence[EngineRequest],
        notes: RequestNotes,
        resume: Resume | None = None,
    ) -> Self:
        """Queue all of them or none; ``notes`` are told what comes of it.

        With ``resume`` they run on when nobody reads them, and may be asked for again. Raises
        OverloadedError, InputError, EngineError.
        """
        name = new_name() if resume is None else resume.name
        streams: list[RequestStream] = []
        try:
            for part, request in enumerate(requests):
                if part:
                    request = msgspec.structs.replace(request, is_further=True)
                if resume is not None:
                    known_by = msgspec.structs.replace(resume, part=part)
                    request = msgspec.structs.replace(request, resume=known_by)
                streams.append(await engine.open(request))
        except BaseException:
            cls(streams, notes, name).abort()
            raise
        generation = cls(streams, notes, name)
        notes.add("prompt_tokens", generation.num_prompt_tokens)
        if generation.is_replayed:
            notes.facts["replayed"] = True
        return generation

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(stream.prompt_token_ids) for stream in self.streams)

    @property
    def num_cached_tokens(self) -> int:
        """Those of all prompts that were not computed anew, as far as it is known."""
        return sum(stream.num_cached_tokens for stream in self.streams)

    async def news(self) -> AsyncGenerator[PromptNews]:
        """What is new, with the number of the prompt it is of, until all have finished."""
        one = len(self.streams) == 1
        async with aclosing(_only(self.streams[0]) if one else _merged(self.streams)) as all_news:
            async for place, news in all_news:
                self._note(news)
                yield place, news

    def abort(self) -> None:
        """Give up what has not ended."""
        for stream in self.streams:
            stream.abort()

    def end(self) -> None:
        """End what has not ended: what was read of it is the whole answer."""
        for stream in self.streams:
            stream.end()

    def _note(self, news: RequestNews) -> None:
        self.heard_at = max(self.heard_at, news.at)
        facts = self._notes.facts
        if num_new := sum(len(delta.token_ids) for delta in news.deltas):
            self.num_output_tokens += num_new
            self._notes.add("output_tokens", num_new)
            if "ttft_ms" not in facts:
                facts["ttft_ms"] = round((time.monotonic() - self._notes.begun_s) * 1e3, 1)
        ended = {delta.finish_reason for delta in news.deltas if delta.finish_reason is not None}
        if ended:
            self._reasons |= ended
            facts["finish_reason"] = ",".join(sorted(self._reasons))


async def _only(stream: RequestStream) -> AsyncGenerator[PromptNews]:
    async for news in stream:
        yield 0, news


async def _merged(streams: Sequence[RequestStream]) -> AsyncGenerator[PromptNews]:
    """The news of all as they come; a reader that is slow holds the engine's news back."""
    queue: asyncio.Queue[PromptNews | SpanwiseError] = asyncio.Queue(len(streams))

    async def pass_on(place: int, stream: RequestStream) -> None:
        try:
            async for news in stream:
                await queue.put((place, news))
        except SpanwiseError as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pass_on(*each)) for each in enumerate(streams)]
    num_left = len(streams)
    try:
        while num_left:
            said = await queue.get()
            if isinstance(said, SpanwiseError):
                raise said
            num_left -= said[1].finished
            yield said
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
