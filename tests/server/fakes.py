"""An engine that computes nothing: the same tokens for the same request, or those of a script."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from spanwise.embedded import EMBEDDED
from spanwise.engine.choice import LiveRequest, new_choice
from spanwise.engine.front import RequestStream
from spanwise.engine.launch import EnginePlan
from spanwise.engine.prompt import read_prompt
from spanwise.engine.tokenizer import Tokenizer
from spanwise.errors import ContextLengthError, EngineError, InputError, SpanwiseError
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import TokenLogprobs
from spanwise.types.serving import (
    CacheInfo,
    DeviceStats,
    EngineHealth,
    EngineRequest,
    EngineStats,
    Histogram,
    RankHealth,
    ReplicaStats,
    RequestNews,
)

MODEL = "spanwise/tiny-dense"
CONTEXT = 256
VOCAB = 4096
TIMES = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
)
EOS = 4  # what ends a chat message
_PLAIN = range(300, 4000)  # tokens that are words and parts of them

# What the model says to a request: token ids, or a text; None for the usual.
Script = Callable[[EngineRequest], Sequence[int] | str | None]


class FakeEngine:
    """Takes requests as an ``AsyncEngine`` does; everything but the model is the real thing.

    ``script`` says what is answered. ``refusal`` is raised in place of taking a request, ``full``
    before one is read. A request fails with ``failure`` after ``fails_after`` tokens. While
    ``holding`` is set nothing comes, and where ``is_late`` is set a request's time is up before its
    first step.
    """

    def __init__(self) -> None:
        self.tokenizer = Tokenizer(EMBEDDED[MODEL])
        self.vocab_size = VOCAB
        self.phase, self.is_ready = "ready", True
        self.script: Script = lambda request: None
        self.refusal: SpanwiseError | None = None
        self.full: SpanwiseError | None = None
        self.failure, self.fails_after = EngineError("worker /dev/x fell over"), -1
        self.holding = False
        self.tokens_per_step = 1
        self.num_cached = 0
        self.is_healthy = True
        self.is_late = False
        self.requests: list[EngineRequest] = []
        self.live: dict[int, asyncio.Task[None]] = {}
        self.num_steps = 0
        self._ids = count()

    @property
    def plan(self) -> EnginePlan:
        if not self.is_ready:
            raise EngineError(f"the engine is not ready: {self.phase}")
        return EnginePlan(
            model=MODEL,
            architecture="LlamaForCausalLM",
            dtype="float32",
            layout="one device",
            max_model_len=CONTEXT,
            cache_tokens=4096,
            ranks=(),
        )

    def check_room(self) -> None:
        if self.full is not None:
            raise self.full

    async def open(self, request: EngineRequest) -> RequestStream:
        if not self.is_ready:
            raise EngineError(f"the engine is not ready: {self.phase}")
        if self.refusal is not None:
            raise self.refusal
        text, token_ids = await asyncio.to_thread(read_prompt, request.prompt, self.tokenizer)
        self._check(token_ids)
        self.requests.append(request)
        params, number = request.params, next(self._ids)
        choices = [new_choice(i, i, self.tokenizer, params) for i in range(params.n)]
        live = LiveRequest(number, text, tuple(token_ids), params, choices)
        stream = RequestStream(live, self._drop)
        self.live[number] = asyncio.create_task(self._run(request, stream))
        return stream

    async def tokenize(self, prompt: str | Mapping[str, Any]) -> list[int]:
        return (await asyncio.to_thread(read_prompt, prompt, self.tokenizer))[1]

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return await asyncio.to_thread(self.tokenizer.decode, token_ids, skip_special_tokens)

    async def health(self) -> EngineHealth:
        return EngineHealth(
            self.is_healthy, (RankHealth("rank 0", "cpu:0", 0.01, self.is_healthy),)
        )

    async def stats(self) -> EngineStats:
        if not self.is_ready:
            raise EngineError(f"the engine is not ready: {self.phase}")
        return EngineStats(
            replicas=(
                ReplicaStats(
                    num_running=2,
                    num_waiting=3,
                    num_used_blocks=5,
                    num_blocks=20,
                    prefix_queried_tokens=100,
                    prefix_hit_tokens=40,
                    prompt_tokens=11,
                    cached_tokens=5,
                    generation_tokens=22,
                    finished={"stop": 4, "length": 2},
                    histograms=dict.fromkeys(TIMES, Histogram((0.01, 0.1), (3, 2, 1), 0.5)),
                ),
                ReplicaStats(
                    num_blocks=20,
                    histograms=dict.fromkeys(TIMES, Histogram((0.01, 0.1), (0, 0, 0), 0.0)),
                ),
            ),
            devices=(
                DeviceStats(
                    device="cpu:0",
                    replica=0,
                    stage=1,
                    rank=2,
                    utilization=0.75,
                    busy_s=12.5,
                    memory_used_bytes=300,
                    memory_total_bytes=1000,
                    weight_bytes=100,
                    cache_bytes=50,
                ),
            ),
            cache=CacheInfo(block_size=16, num_tokens=320, prefix_caching=True),
            num_refused=7,
        )

    # -- what the real one leaves to its processes -----------------------------------------------

    def _check(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise InputError("the prompt has no tokens; give at least one")
        if len(token_ids) >= CONTEXT:
            raise ContextLengthError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len {CONTEXT} leaves room "
                f"for {CONTEXT - 1}; shorten it or raise max_model_len"
            )

    def _drop(self, number: int, last_words: Sequence[Any]) -> None:
        if (task := self.live.pop(number, None)) is not None:
            task.cancel()

    async def _run(self, request: EngineRequest, stream: RequestStream) -> None:
        try:
            await self._answer(request, stream)
        finally:
            self.live.pop(stream.live.request_id, None)

    async def _answer(self, request: EngineRequest, stream: RequestStream) -> None:
        live = stream.live
        while self.holding:
            await asyncio.sleep(0.005)
        stream.num_cached_tokens = self.num_cached
        if self.is_late:
            live.choices[0].take(SequenceUpdate(sequence_id=0, finish_reason="deadline"))
            stream.push(RequestNews((live.choices[0].delta(),), finished=True))
            return
        if request.task != "generate":
            live.choices[0].take(SequenceUpdate(sequence_id=0, finish_reason="stop"))
            pooled = _vector(live.prompt_token_ids, request.task)
            stream.push(RequestNews((live.choices[0].delta(),), pooled=pooled, finished=True))
            return
        if request.params.prompt_logprobs is not None:
            wanted = request.params.prompt_logprobs
            live.prompt_logprobs += [_logprobs(i, wanted) for i in live.prompt_token_ids[1:]]
        said = [self._words(request, live, choice) for choice in range(request.params.n)]
        for step in count():
            self.num_steps += 1
            if step == self.fails_after:
                stream.fail(self.failure)
                return
            while self.holding:
                await asyncio.sleep(0.005)
            deltas = []
            for choice in live.choices:
                if choice.finish_reason is None:
                    place = step * self.tokens_per_step
                    new = said[choice.index][place : place + self.tokens_per_step]
                    is_last = place + self.tokens_per_step >= len(said[choice.index])
                    choice.take(self._update(request, choice.index, new, is_last))
                    deltas.append(choice.delta())
            scores = live.new_prompt_logprobs()
            stream.push(RequestNews(tuple(deltas), scores, finished=live.finished))
            if live.finished:
                return
            await asyncio.sleep(0)

    def _words(self, request: EngineRequest, live: LiveRequest, choice: int) -> list[int]:
        """The tokens of a choice, as many as there may be; those of a script end by themselves."""
        params = request.params
        room = CONTEXT - len(live.prompt_token_ids)
        most = room if params.max_tokens is None else min(room, params.max_tokens)
        said = self.script(request)
        if isinstance(said, str):
            said = self.tokenizer.encode(said, add_special_tokens=False)
        if said is not None:
            return [*said, EOS][:most]
        seed = hashlib.sha256(repr((live.prompt_token_ids, params.seed, choice)).encode()).digest()
        digits = hashlib.shake_256(seed).digest(2 * most)
        pairs = zip(digits[::2], digits[1::2], strict=True)
        return [_PLAIN[(a << 8 | b) % len(_PLAIN)] for a, b in pairs]

    def _update(
        self, request: EngineRequest, choice: int, new: list[int], is_last: bool
    ) -> SequenceUpdate:
        wanted = request.params.logprobs
        stopped = is_last and bool(new) and new[-1] == EOS
        return SequenceUpdate(
            sequence_id=choice,
            token_ids=tuple(new),
            logprobs=() if wanted is None else tuple(_logprobs(i, wanted) for i in new),
            finish_reason=("stop" if stopped else "length") if is_last else None,
            stop_reason=EOS if stopped else None,
        )


def _logprobs(token_id: int, wanted: int) -> TokenLogprobs:
    """The token itself is the best one, but for every seventh, which is the third."""
    if token_id % 7:
        ids = (token_id, token_id + 1, token_id + 2, *range(10, 30))[:wanted]
        return TokenLogprobs(token_id, -0.5, 1, ids, tuple(-0.5 - i for i in range(len(ids))))
    ids = (token_id + 1, token_id + 2, token_id, *range(10, 30))[:wanted]
    return TokenLogprobs(token_id, -2.5, 3, ids, tuple(-0.5 - i for i in range(len(ids))))


def _vector(token_ids: Sequence[int], task: str) -> tuple[float, ...]:
    mean = sum(token_ids) / len(token_ids)
    return (float(token_ids[-1]), mean, 2.0 if task == "pool_mean" else 1.0)
