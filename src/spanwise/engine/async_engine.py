"""The engine for programs that do several things at once: a server, or an asyncio script."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar

from spanwise.engine.choice import LiveRequest, new_choice
from spanwise.engine.config import EngineConfig, ServiceConfig
from spanwise.engine.front import Front, RequestStream
from spanwise.engine.grammar import GrammarChecker
from spanwise.engine.launch import EnginePlan
from spanwise.engine.messages import Abort, Admit, Attach, Bound, EndChoice, Running, Submit
from spanwise.engine.prompt import Prompt, read_prompt
from spanwise.engine.sampling_defaults import resolve_sampling, stop_token_ids
from spanwise.engine.service import EngineService
from spanwise.engine.tokenizer import Tokenizer
from spanwise.errors import EngineError, OverloadedError
from spanwise.types.outputs import RequestOutput
from spanwise.types.resume import AnswerName
from spanwise.types.sampling import Grammar, SamplingParams
from spanwise.types.serving import EngineHealth, EngineRequest, EngineStats

Result = TypeVar("Result")

_BYTES_PER_TOKEN = 4  # of ordinary text; a guess is enough for admission
_NUM_THREADS = 2
_NUM_CHECKS = 8


class AsyncEngine:
    """An engine in processes of its own, for one event loop.

    Tokenizing and detokenizing run on threads, computing in other processes::

        async with await AsyncEngine.start(EngineConfig(model="spanwise/tiny-dense")) as engine:
            async for output in engine.generate("def main(", SamplingParams(max_tokens=32)):
                print(output.outputs[0].text)
    """

    def __init__(self, sock: socket.socket, service: EngineService | None = None) -> None:
        """Connect to an engine; ``service`` is the one that ``close`` is to end, if any."""
        self._front = Front(sock, asyncio.get_running_loop())
        self._service = service
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="text")
        # Of their own: a check may keep its thread for seconds.
        self._check_threads = ThreadPoolExecutor(_NUM_CHECKS, thread_name_prefix="grammar")
        self._grammars: GrammarChecker | None = None
        self._request_ids = count()

    @classmethod
    async def start(cls, config: EngineConfig) -> Self:
        """Start an engine, and wait until it takes requests. Raises InputError, EngineError."""
        service = EngineService(ServiceConfig(engine=config))
        try:
            engine = cls(service.connect(), service)
        except BaseException:
            service.close()
            raise
        try:
            await engine.wait_ready()
        except BaseException:
            await engine.close()
            raise
        return engine

    async def wait_ready(self) -> None:
        """Wait until requests are taken. Raises what the start failed with."""
        await self._front.wait_running()
        await self._in_thread(self.tokenizer.wait)

    @property
    def phase(self) -> str:
        """How far the start has come; "ready" when requests are taken."""
        return self._front.phase

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._front.running is not None

    @property
    def plan(self) -> EnginePlan:
        """What was decided at start. Raises EngineError while it goes on."""
        return self._running().plan

    @property
    def vocab_size(self) -> int:
        """The model's number of token ids. Raises EngineError while the start goes on."""
        return self._running().vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises EngineError before the model is found."""
        if self._front.tokenizer is None:
            raise EngineError(f"the engine is not ready: {self.phase}")
        return self._front.tokenizer

    def check_room(self) -> None:
        """Raise OverloadedError where a request would certainly be refused, whatever it is.

        Costs nothing: the engine said so a moment ago, and is not asked.
        """
        self._front.check_room()

    async def open(self, request: EngineRequest) -> RequestStream:
        """Queue a request, and give the stream of its news.

        Raises OverloadedError (judged before tokenizing) where there is no room, InputError for a
        prompt or parameter that cannot be, EngineError where the engine does not run.
        """
        running = self._running()
        request_id, arrived_s = next(self._request_ids), time.monotonic()
        guess = _guess_tokens(request.prompt)
        try:
            admit = Admit(
                request_id, guess, request.tenant, arrived_s, request.resume, request.is_further
            )
            bound = await self._front.ask(request_id, admit)
            if bound is not None:
                return await self._attach(bound, request)
            return await self._submit(request_id, arrived_s, request, running)
        except BaseException:
            self._close_request(request_id, [Abort(request_id)])
            raise

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Generate for one prompt; yields the whole request each time it has grown.

        A prompt is as ``LLM.generate`` takes it. Leaving early ends the request.
        """
        params = sampling_params or SamplingParams()
        stream = await self.open(EngineRequest(prompt=prompt, params=params))
        try:
            async for _ in stream:
                yield stream.live.output()
        finally:
            stream.abort()

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises InputError."""
        tokenizer = self.tokenizer
        _, token_ids = await self._in_thread(lambda: read_prompt(prompt, tokenizer))
        return token_ids

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        tokenizer = self.tokenizer
        return await self._in_thread(lambda: tokenizer.decode(token_ids, skip_special_tokens))

    async def health(self) -> EngineHealth:
        """Whether the engine's loop and every rank answer."""
        try:
            return await self._front.health()
        except EngineError as error:
            return EngineHealth(False, reason=str(error))

    async def stats(self) -> EngineStats:
        """What the engine has counted. Raises EngineError."""
        return await self._front.stats()

    def interrupt(self, reason: str) -> None:
        """End every open request with an OverloadedError, and take no more: this program ends."""
        self._front.interrupt(OverloadedError(reason))

    async def close(self) -> None:
        """End the connection, and the engine where it was started here. May be called again."""
        self._front.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._check_threads.shutdown(wait=False, cancel_futures=True)
        if self._grammars is not None:
            await asyncio.to_thread(self._grammars.close)
        if self._service is not None:
            await asyncio.to_thread(self._service.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _running(self) -> Running:
        if self._front.running is None:
            raise EngineError(f"the engine is not ready: {self.phase}")
        return self._front.running

    async def _submit(
        self, request_id: int, arrived_s: float, request: EngineRequest, running: Running
    ) -> RequestStream:
        tokenizer, params = self.tokenizer, request.params
        text, token_ids = await self._in_thread(lambda: read_prompt(request.prompt, tokenizer))
        if params.grammar is not None:
            await self._check(params.grammar, params.stop_token_ids or ())
        specs = resolve_sampling(params, running.defaults, running.vocab_size)
        stream = self._new_stream(request_id, text, tuple(token_ids), params)
        timeout_s = request.timeout_s
        submit = Submit(
            request_id,
            stream.prompt_token_ids,
            tuple(specs),
            params.max_tokens,
            stop_token_ids(params, running.defaults),
            params.stop_strings,
            params.skip_special_tokens,
            request.task,
            request.priority,
            None if timeout_s is None else arrived_s + timeout_s,
            request.cache_salt,
        )
        await self._front.ask(request_id, submit)
        return stream

    async def _attach(self, bound: Bound, request: EngineRequest) -> RequestStream:
        """Follow what was asked for before, from its beginning."""
        await self._in_thread(self.tokenizer.wait)
        request_id, token_ids = bound.request_id, bound.prompt_token_ids
        text = request.prompt if isinstance(request.prompt, str) else None
        stream = self._new_stream(request_id, text, token_ids, request.params, bound.name)
        self._front.send(Attach(request_id))
        return stream

    def _new_stream(
        self,
        request_id: int,
        text: str | None,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        bound_to: AnswerName | None = None,
    ) -> RequestStream:
        choices = [new_choice(i, i, self.tokenizer, params) for i in range(params.n)]
        live = LiveRequest(request_id, text, token_ids, params, choices)
        stream = RequestStream(live, self._close_request, bound_to)
        self._front.add_stream(stream)
        return stream

    async def _check(self, grammar: Grammar, stop_token_ids: Sequence[int]) -> None:
        if self._grammars is None:
            self._grammars = GrammarChecker(self.tokenizer.folder)
        check = partial(self._grammars.check, grammar, stop_token_ids)
        await asyncio.get_running_loop().run_in_executor(self._check_threads, check)

    def _close_request(self, request_id: int, last_words: Sequence[Abort | EndChoice]) -> None:
        self._front.drop_stream(request_id)
        for message in last_words:
            self._front.send(message)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _guess_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt has, without looking closely."""
    if isinstance(prompt, str):
        return 1 + len(prompt) // _BYTES_PER_TOKEN
    if (ids := prompt.get("prompt_token_ids")) is not None:
        return len(ids) if isinstance(ids, Sequence) else 1
    return 1 + _num_characters(prompt) // _BYTES_PER_TOKEN


def _num_characters(value: Any) -> int:
    """The characters of all texts in a record."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_num_characters(each) for each in value.values())
    if isinstance(value, Sequence):
        return sum(_num_characters(each) for each in value)
    return 0
