"""The answer to a completion request, whole or in events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from spanwise.server import sse
from spanwise.server.asking import usage_of
from spanwise.server.errors import timed_out
from spanwise.server.generation import Generation
from spanwise.server.protocol.completion import CompletionRequest
from spanwise.server.protocol.completion_answer import Completion, CompletionChoice, FinishReason
from spanwise.server.protocol.logprobs import CompletionLogprobs
from spanwise.server.protocol.usage import Usage
from spanwise.server.service import Service
from spanwise.server.token_text import CompletionScorer, TokenText, joined
from spanwise.types.plan import TokenLogprobs
from spanwise.types.serving import ChoiceDelta, RequestNews


@dataclass
class _Prompt:
    """One prompt: ``echo`` is its text where that is shown, ``scores`` what came of it."""

    token_ids: tuple[int, ...]
    echo: str
    scores: list[TokenLogprobs | None] = field(default_factory=list)


@dataclass
class _Choice:
    """One completion as far as it has come."""

    index: int
    prompt: _Prompt
    scorer: CompletionScorer
    has_begun: bool = False
    has_ended: bool = False


class CompletionAnswer:
    """The completions of all prompts; use ``whole`` or ``events``, once.

    ``echoes``: the prompts' texts, where they are shown. Where no token was asked for, the one that
    the engine draws nevertheless is left out.
    """

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        generation: Generation,
        echoes: list[str],
    ) -> None:
        tokenizer = service.engine.tokenizer
        self._body, self._generation, self._n = body, generation, body.n or 1
        self._id, self._created = f"cmpl-{generation.name.id}", generation.name.created
        self._model, self._fingerprint = body.model, service.fingerprint
        self._tokens = TokenText(tokenizer, bool(body.return_tokens_as_token_ids))
        hidden = tokenizer.special_token_ids if body.skip_special_tokens is not False else ()
        self._prompts = [
            _Prompt(stream.prompt_token_ids, echo)
            for stream, echo in zip(generation.streams, echoes, strict=True)
        ]
        self._choices = [
            _Choice(index, prompt, CompletionScorer(self._tokens, frozenset(hidden)))
            for index, prompt in enumerate(p for p in self._prompts for _ in range(self._n))
        ]

    async def whole(self) -> Completion:
        """Wait for all of it. Raises what ends it early."""
        pieces: list[list[CompletionChoice]] = [[] for _ in self._choices]
        try:
            async with aclosing(self._generation.news()) as all_news:
                async for place, news in all_news:
                    for piece in self._pieces(place, news):
                        pieces[piece.index].append(piece)
        finally:
            self._generation.abort()
        return self._completion([self._joined(each) for each in pieces], self._usage())

    async def events(self) -> AsyncGenerator[bytes]:
        """The events as they come, those of one step together. Raises what ends it early."""
        async with aclosing(self._generation.news()) as all_news:
            async for place, news in all_news:
                pieces = [piece for piece in self._pieces(place, news) if _says_something(piece)]
                if pieces:
                    yield b"".join(map(sse.event, map(self._chunk, pieces)))
        if self._body.includes_usage:
            yield sse.event(self._completion([], self._usage())) + sse.DONE
        else:
            yield sse.DONE

    def _pieces(self, place: int, news: RequestNews) -> Iterator[CompletionChoice]:
        self._prompts[place].scores += news.prompt_logprobs
        for delta in news.deltas:
            choice = self._choices[place * self._n + delta.index]
            if delta.finish_reason == "deadline":
                raise timed_out()
            if not choice.has_ended:
                yield self._piece(choice, delta)

    def _piece(self, choice: _Choice, delta: ChoiceDelta) -> CompletionChoice:
        """What a delta adds; the first piece of a choice has the echoed prompt too."""
        first, choice.has_begun = not choice.has_begun, True
        drawn = self._body.length > 0
        prompt, text, scores = choice.prompt, delta.text if drawn else "", []
        if first and self._body.echo:
            text = prompt.echo + text
            if self._body.logprobs is not None:
                scores.append(
                    choice.scorer.score_prompt(prompt.token_ids, prompt.scores, prompt.echo)
                )
        if self._body.logprobs is not None and drawn:
            scores.append(choice.scorer.score(delta.logprobs))
        end: FinishReason | None = "stop" if delta.finish_reason == "stop" else None
        if delta.finish_reason == "length" or not drawn:
            end = "length"
        choice.has_ended = end is not None
        ids = bool(self._body.return_token_ids)
        return CompletionChoice(
            choice.index,
            text,
            joined(scores) if scores else None,
            end,
            list(delta.token_ids if drawn else ()) if ids else UNSET,
            list(prompt.token_ids) if ids and first else UNSET,
        )

    def _joined(self, pieces: list[CompletionChoice]) -> CompletionChoice:
        """All pieces of a choice in one."""
        first, prompt = pieces[0], self._choices[pieces[0].index].prompt
        scores = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        token_ids = [x for piece in pieces if piece.token_ids for x in piece.token_ids]
        return CompletionChoice(
            first.index,
            "".join(piece.text for piece in pieces),
            joined(scores) if scores else None,
            pieces[-1].finish_reason,
            token_ids if first.token_ids is not UNSET else UNSET,
            first.prompt_token_ids,
            UNSET if self._body.prompt_logprobs is None else self._tokens.prompt(prompt.scores),
        )

    def _chunk(self, piece: CompletionChoice) -> Completion:
        usage: Usage | UnsetType | None = None if self._body.includes_usage else UNSET
        if self._body.includes_every_usage:
            usage = self._usage()
        return self._completion([piece], usage)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )

    def _usage(self) -> Usage:
        return usage_of(self._generation, None if self._body.length else 0)


def _says_something(piece: CompletionChoice) -> bool:
    shown: CompletionLogprobs | None = piece.logprobs
    return bool(
        piece.text
        or piece.finish_reason
        or (shown is not None and shown.tokens)
        or (piece.token_ids is not UNSET and piece.token_ids)
    )
