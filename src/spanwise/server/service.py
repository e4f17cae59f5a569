"""What all routes share: the engine, and how it is presented."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from http import HTTPStatus
from importlib import metadata
from pathlib import PurePath

from spanwise.engine.launch import EnginePlan
from spanwise.engine.tokenizer import Tokenizer
from spanwise.server.engine import ServingEngine
from spanwise.server.errors import ApiError, bad_request, cut, not_ready, too_long
from spanwise.server.options import ServerOptions


@dataclass
class Service:
    """One engine and the options of its server, which began at ``created`` (Unix time)."""

    engine: ServingEngine
    options: ServerOptions
    created: int = field(default_factory=lambda: int(time.time()))
    _fingerprint: str | None = None
    _longest_token: int | None = None

    @property
    def plan(self) -> EnginePlan:
        """What the engine decided at start. Raises ApiError while it is not ready."""
        if not self.engine.is_ready:
            raise not_ready(self.engine.phase)
        return self.engine.plan

    @property
    def model_names(self) -> tuple[str, ...]:
        """What the model is called here. Raises ApiError while the engine is not ready."""
        return self.options.served_model_names or (self.own_name,)

    @property
    def own_name(self) -> str:
        """The model's own name. Raises ApiError while the engine is not ready."""
        return _short_name(self.plan.model)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same request might give another answer."""
        if self._fingerprint is None:
            plan = self.plan
            parts = (version(), plan.model, plan.architecture, plan.dtype, plan.layout)
            self._fingerprint = "fp_" + sha256("\0".join(parts).encode()).hexdigest()[:10]
        return self._fingerprint

    def check_model(self, name: str | None) -> str:
        """The name a request used, the first one where it used none. Raises ApiError."""
        names = self.model_names
        if name is None:
            return names[0]
        if name not in names:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"the model '{cut(name)}' does not exist; GET /v1/models lists those that do",
                code="model_not_found",
                param="model",
            )
        return name

    async def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded. Raises ApiError while the engine is not ready."""
        if not self.engine.is_ready:
            raise not_ready(self.engine.phase)
        tokenizer = self.engine.tokenizer
        if not tokenizer.is_loaded:
            await asyncio.to_thread(tokenizer.wait)
        return tokenizer

    async def template(self, with_tools: bool) -> str | None:
        """The chat template in use; None where there is none."""
        if self.options.chat_template is not None:
            return self.options.chat_template
        tokenizer = await self.tokenizer()
        return tokenizer.chat_template(with_tools) if tokenizer.exists else None

    def check_ids(self, token_ids: list[int], param: str) -> None:
        """Raise ApiError, naming the place, for an id that is no token's."""
        if max(token_ids) < self.engine.vocab_size:
            return
        place = next(i for i, number in enumerate(token_ids) if number >= self.engine.vocab_size)
        raise bad_request(
            f"{param}[{place}] is {token_ids[place]}, which is not in the vocabulary; "
            f"use ids 0 to {self.engine.vocab_size - 1}",
            f"{param}[{place}]",
        )

    def check_known(self, token_ids: Iterable[int], param: str) -> None:
        """Raise ApiError for an id that is no token's."""
        for token_id in token_ids:
            if token_id >= self.engine.vocab_size:
                raise bad_request(
                    f"{param}: token id {token_id} is not in the vocabulary; "
                    f"use ids 0 to {self.engine.vocab_size - 1}",
                    param,
                )

    async def check_length(self, num_characters: int, param: str) -> None:
        """Raise ApiError for a text that is certainly longer than the context.

        So that nobody waits while millions of tokens are made of it in vain.
        """
        tokenizer, room = await self.tokenizer(), self.plan.max_model_len
        if not tokenizer.exists or num_characters <= room:
            return
        if self._longest_token is None:
            self._longest_token = await asyncio.to_thread(lambda: tokenizer.longest_token)
        at_least = num_characters // self._longest_token
        if at_least > room:
            raise too_long(
                f"the prompt has more than {at_least} tokens, but the model's context is {room}; "
                "shorten it",
                param,
            )


def version() -> str:
    """The version of this package."""
    return metadata.version("spanwise")


def _short_name(model: str) -> str:
    """A folder's own name; where it lies is nobody's business."""
    path = PurePath(model)
    return path.name if path.is_absolute() or model.startswith(".") else model
