"""The engine's part of one HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Self

from spanwise.errors import SpanwiseError
from spanwise.server.engine import RequestStream, ServingEngine
from spanwise.types.serving import EngineRequest, RequestNews

PromptNews = tuple[int, RequestNews]


class Generation:
    """One engine request for each prompt, in their order."""

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self.streams = streams
        self.num_output_tokens = 0

    @classmethod
    async def open(cls, engine: ServingEngine, requests: Sequence[EngineRequest]) -> Self:
        """Queue all of them or none. Raises OverloadedError, InputError, EngineError."""
        streams: list[RequestStream] = []
        try:
            for request in requests:
                streams.append(await engine.open(request))
        except BaseException:
            cls(streams).abort()
            raise
        return cls(streams)

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
                self.num_output_tokens += sum(len(delta.token_ids) for delta in news.deltas)
                yield place, news

    def abort(self) -> None:
        """End what has not ended."""
        for stream in self.streams:
            stream.abort()


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
