"""The engine as the routes see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from spanwise.engine.launch import EnginePlan
from spanwise.engine.tokenizer import Tokenizer
from spanwise.types.resume import AnswerName
from spanwise.types.serving import EngineHealth, EngineRequest, EngineStats, RequestNews


class RequestStream(Protocol):
    """News of one request; see ``engine.front.RequestStream``."""

    num_cached_tokens: int
    bound_to: AnswerName | None

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as the model reads it."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> RequestNews: ...

    def abort(self) -> None:
        """Give the request up; harmless when it has ended."""

    def end(self) -> None:
        """End the request where it is: what has been read is the answer."""


class ServingEngine(Protocol):
    """What an ``AsyncEngine`` offers to its server."""

    @property
    def plan(self) -> EnginePlan:
        """What was decided at start. Raises EngineError while it goes on."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises EngineError before the model is found."""

    @property
    def vocab_size(self) -> int:
        """The model's number of token ids. Raises EngineError while the start goes on."""

    @property
    def phase(self) -> str:
        """How far the start has come; "ready", or "failed: ..."."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""

    def check_room(self) -> None:
        """Raise OverloadedError where a request would certainly be refused, whatever it is."""

    async def open(self, request: EngineRequest) -> RequestStream:
        """Queue a request. Raises OverloadedError, InputError, EngineError."""

    async def tokenize(self, prompt: str | Mapping[str, Any]) -> list[int]:
        """Token ids of a prompt. Raises InputError."""

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""

    async def health(self) -> EngineHealth:
        """Whether the engine's loop and every rank answer."""

    async def stats(self) -> EngineStats:
        """What the engine has counted. Raises EngineError."""
