"""A front's side of the border to the engine process: text here, tokens there."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import msgspec

from spanwise.engine.choice import LiveRequest
from spanwise.engine.messages import (
    Abort,
    Accepted,
    Admitted,
    AskHealth,
    AskStats,
    Bound,
    ChoiceUpdate,
    CountRefused,
    EndChoice,
    EngineFailed,
    FromFront,
    Health,
    Located,
    News,
    Phase,
    Refused,
    RequestFailed,
    Running,
    Stats,
    ToFront,
)
from spanwise.engine.tokenizer import Tokenizer
from spanwise.errors import EngineError, OverloadedError, SpanwiseError
from spanwise.types.resume import AnswerName
from spanwise.types.serving import ChoiceDelta, EngineHealth, EngineStats, RequestNews
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.failure import error_of

Answer = TypeVar("Answer")

# So long a refusal for all stands before the engine is asked again: asking costs it more than a
# place that stays empty meanwhile.
_FULL_S = 0.02

STARTING = "starting"
READY = "ready"


class RequestStream:
    """News of one request, for ``async for``; ends after the news that says ``finished``.

    Raises EngineError where the engine fails meanwhile. A reader that is slow gets several steps'
    news in one; one that leaves early calls ``abort``, or ``end`` where it has all it wants.
    ``bound_to``: what the answer is called that was asked for before, where it was.
    """

    def __init__(
        self,
        live: LiveRequest,
        close: Callable[[int, Sequence[Abort | EndChoice]], None],
        bound_to: AnswerName | None = None,
    ) -> None:
        """``close(request_id, messages)`` ends the news, and says the last words to the engine."""
        self.live = live
        self.bound_to = bound_to
        self.num_cached_tokens = 0
        self._close = close
        self._num_read = [0] * len(live.choices)
        self._pending: list[RequestNews] = []
        self._error: SpanwiseError | None = None
        self._is_over = False
        self._wake = asyncio.Event()

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as the model reads it."""
        return self.live.prompt_token_ids

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestNews:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        pending, self._pending = self._pending, []
        news = pending[0] if len(pending) == 1 else _joined(pending)
        self._is_over = news.finished
        for delta in news.deltas:
            self._num_read[delta.index] += len(delta.token_ids)
        return news

    def abort(self) -> None:
        """Give the request up; harmless when it has ended."""
        self._leave([Abort(self.live.request_id)])

    def end(self) -> None:
        """End the request where it is: what has been read is the answer."""
        request_id, counts = self.live.request_id, enumerate(self._num_read)
        self._leave([EndChoice(request_id, choice, None, count) for choice, count in counts])

    def push(self, news: RequestNews) -> None:
        """Take news; called on the event loop."""
        if not self._is_over:
            self._pending.append(news)
            self._wake.set()

    def fail(self, error: SpanwiseError) -> None:
        """The request has failed; called on the event loop."""
        self._error = error
        self._wake.set()

    def _leave(self, last_words: Sequence[Abort | EndChoice]) -> None:
        if not self._is_over and self._error is None:
            self._is_over = True
            self._pending.clear()
            self._close(self.live.request_id, last_words)
            self._wake.set()


class Front:
    """Sends requests, and turns what comes back into text, on threads of its own.

    All methods are for the thread of the event loop. ``tokenizer`` is there once the model is
    located. ``phase`` says how far the engine's start has come; ``failed: ...`` once it has failed.
    """

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self.phase = STARTING
        self.running: Running | None = None
        self.tokenizer: Tokenizer | None = None
        self._loop = loop
        self._channel: Channel[ToFront] = Channel(sock, ToFront)
        self._sock = sock
        self._outgoing: SimpleQueue[FromFront | None] = SimpleQueue()
        self._streams: dict[int, RequestStream] = {}
        self._answers: dict[int, asyncio.Future[Bound | None]] = {}
        self._health: deque[asyncio.Future[EngineHealth]] = deque()
        self._stats: deque[asyncio.Future[EngineStats]] = deque()
        self._failure: SpanwiseError | None = None
        self._full: Refused | None = None
        self._full_until_s = 0.0
        self._num_refused = 0
        self._changed = asyncio.Event()
        self._threads = [
            threading.Thread(target=work, name=f"front-{work.__name__}", daemon=True)
            for work in (self._listen, self._speak)
        ]
        for thread in self._threads:
            thread.start()

    async def wait_running(self) -> Running:
        """Wait until the engine takes requests. Raises what its start failed with."""
        while self.running is None:
            self._raise_failure()
            self._changed.clear()
            await self._changed.wait()
        return self.running

    async def ask(self, request_id: int, message: FromFront) -> Bound | None:
        """Send a message about a request and wait for its answer, which may be that it is bound.

        Raises OverloadedError for a refusal, and what the request failed with.
        """
        self._raise_failure()
        self._report_refused()
        answer: asyncio.Future[Bound | None] = self._loop.create_future()
        self._answers[request_id] = answer
        try:
            self.send(message)
            return await answer
        finally:
            self._answers.pop(request_id, None)

    def check_room(self) -> None:
        """Raise OverloadedError where the engine has just refused one for all, and count it."""
        if self._full is not None and self._loop.time() < self._full_until_s:
            self._num_refused += 1
            raise _overloaded(self._full)

    def send(self, message: FromFront) -> None:
        """Send a message that has no answer, or whose answer is news."""
        self._outgoing.put(message)

    def add_stream(self, stream: RequestStream) -> None:
        """Bring the news of this request to the stream from now on."""
        self._streams[stream.live.request_id] = stream

    def drop_stream(self, request_id: int) -> None:
        """Bring no more news of a request."""
        self._streams.pop(request_id, None)

    async def health(self) -> EngineHealth:
        """What the engine says of itself and its ranks."""
        return await self._query(AskHealth(), self._health)

    async def stats(self) -> EngineStats:
        """What the engine has counted."""
        self._report_refused()
        return await self._query(AskStats(), self._stats)

    def interrupt(self, error: SpanwiseError) -> None:
        """Fail whatever waits, and all that would come."""
        self._fail(error)

    def close(self) -> None:
        """End the connection; the engine aborts what is still open."""
        self._sock.shutdown(socket.SHUT_RDWR)
        self._outgoing.put(None)
        for thread in self._threads:
            thread.join()
        self._channel.close()

    async def _query(
        self, question: AskHealth | AskStats, waiting: deque[asyncio.Future[Answer]]
    ) -> Answer:
        self._raise_failure()
        answer: asyncio.Future[Answer] = self._loop.create_future()
        waiting.append(answer)
        self.send(question)
        return await answer

    def _report_refused(self) -> None:
        if self._num_refused:
            self.send(CountRefused(self._num_refused))
            self._num_refused = 0

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _speak(self) -> None:
        """On a thread: send what is to be sent, and wait where the engine does not take it."""
        while (message := self._outgoing.get()) is not None:
            try:
                self._channel.send(message)
            except ChannelClosed:
                return  # the listening thread learns of it too, and says why

    # -- the listening thread --------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while True:
                self._hand_over([self._prepared(self._channel.receive())])
        except ChannelClosed:
            self._hand_over([lambda: self._fail(EngineError("the engine process is gone"))])

    def _hand_over(self, actions: list[Callable[[], None]]) -> None:
        def run() -> None:
            for action in actions:
                action()

        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def _prepared(self, message: ToFront) -> Callable[[], None]:
        """Do what can be done here, and give what is left to do on the event loop."""
        if isinstance(message, News):
            news = self._in_words(message.updates)
            return lambda: self._deliver(news)
        if isinstance(message, Located):
            tokenizer = Tokenizer(Path(message.folder))
            tokenizer.start()
            return lambda: self._set_tokenizer(tokenizer)
        return lambda: self._handle(message)

    def _in_words(self, updates: tuple[ChoiceUpdate, ...]) -> list[tuple[int, RequestNews, int]]:
        """Request ids, their news, and how many prompt tokens were cached."""
        news = []
        for each in updates:
            stream = self._streams.get(each.request_id)
            if stream is None:
                continue  # aborted meanwhile
            live, update = stream.live, each.update
            choice = live.choices[each.choice]
            if choice.take(update):
                reason, num_tokens = str(choice.stop_reason), len(choice.token_ids)
                self.send(EndChoice(each.request_id, each.choice, reason, num_tokens))
            if each.choice == 0:
                live.prompt_logprobs += update.prompt_logprobs
            said = RequestNews(
                deltas=(choice.delta(),),
                prompt_logprobs=live.new_prompt_logprobs(),
                pooled=update.pooled,
                finished=live.finished,
                at=each.at,
            )
            news.append((each.request_id, said, getattr(update, "num_cached_tokens", 0)))
        return news

    # -- on the event loop -----------------------------------------------------------------------

    def _deliver(self, news: list[tuple[int, RequestNews, int]]) -> None:
        for request_id, said, num_cached in news:
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            stream.num_cached_tokens = max(stream.num_cached_tokens, num_cached)
            if said.finished:
                del self._streams[request_id]
            stream.push(said)

    def _set_tokenizer(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def _handle(self, message: ToFront) -> None:
        match message:
            case Phase(text):
                self.phase = text
            case Running():
                self.running, self.phase = message, READY
            case Admitted(request_id) | Accepted(request_id):
                self._answer(request_id, None)
            case Bound():
                self._answer(message.request_id, message)
            case Refused():
                if message.for_all:
                    self._full, self._full_until_s = message, self._loop.time() + _FULL_S
                self._answer(message.request_id, _overloaded(message))
            case RequestFailed():
                self._fail_request(message.request_id, error_of(message.error))
            case Health():
                _resolve(self._health.popleft(), message.health)
            case Stats():
                _resolve(self._stats.popleft(), message.stats)
            case EngineFailed():
                self._fail(error_of(message.error))
            case News() | Located():
                raise AssertionError("prepared by the listening thread")
        self._changed.set()

    def _answer(self, request_id: int, said: Bound | SpanwiseError | None) -> None:
        answer = self._answers.get(request_id)
        if answer is None or answer.done():
            return
        if isinstance(said, SpanwiseError):
            answer.set_exception(said)
        else:
            answer.set_result(said)

    def _fail_request(self, request_id: int, error: SpanwiseError) -> None:
        self._answer(request_id, error)
        if (stream := self._streams.pop(request_id, None)) is not None:
            stream.fail(error)

    def _fail(self, error: SpanwiseError) -> None:
        """The engine has failed, and with it all that waits for it."""
        if self._failure is not None:
            return
        self._failure = error
        self.running, self.phase = None, f"failed: {error}"
        for request_id in [*self._answers, *self._streams]:
            self._fail_request(request_id, error)
        _reject(self._health, error)
        _reject(self._stats, error)
        self._changed.set()


def _overloaded(refused: Refused) -> OverloadedError:
    return OverloadedError(refused.message, refused.retry_after_s, refused.tenant)


def _resolve(waiting: asyncio.Future[Answer], answer: Answer) -> None:
    if not waiting.done():  # whoever asked may have left
        waiting.set_result(answer)


def _reject(waiting: deque[asyncio.Future[Answer]], error: SpanwiseError) -> None:
    for each in waiting:
        if not each.done():
            each.set_exception(error)


def _joined(pending: list[RequestNews]) -> RequestNews:
    """Several steps' news in one: the deltas of each choice joined, choices in order."""
    by_choice: dict[int, list[ChoiceDelta]] = {}
    for news in pending:
        for delta in news.deltas:
            by_choice.setdefault(delta.index, []).append(delta)
    return RequestNews(
        deltas=tuple(_joined_deltas(by_choice[index]) for index in sorted(by_choice)),
        prompt_logprobs=tuple(x for news in pending for x in news.prompt_logprobs),
        pooled=next((news.pooled for news in pending if news.pooled is not None), None),
        finished=pending[-1].finished,
        at=pending[-1].at,
    )


def _joined_deltas(deltas: list[ChoiceDelta]) -> ChoiceDelta:
    return msgspec.structs.replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(x for delta in deltas for x in delta.token_ids),
        logprobs=tuple(x for delta in deltas for x in delta.logprobs),
    )
