"""Tokens as clients are shown them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from spanwise.engine.tokenizer import Tokenizer
from spanwise.server.protocol.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from spanwise.types.plan import TokenLogprobs

# JSON has no infinity.
_LEAST = -9999.0


class TokenText:
    """The texts of a model's tokens; ``as_ids``: ``token_id:123`` in place of each."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """A token's text; bytes that are none on their own are spelled out."""
        if token_id not in self._texts:
            self._texts[token_id] = self._spell(token_id)
        return self._texts[token_id]

    def octets(self, token_id: int) -> bytes:
        """What a token adds to the bytes of a text."""
        return self._tokenizer.token_bytes(token_id)

    def _spell(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        octets = self.octets(token_id)
        try:
            return octets.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{octet:02x}" for octet in octets)

    def chat(self, entries: Sequence[TokenLogprobs]) -> list[TokenLogprob]:
        """Log probabilities as chat shows them."""
        return [
            TokenLogprob(
                self.text(entry.token_id),
                finite(entry.logprob),
                list(self.octets(entry.token_id)),
                [
                    TopLogprob(self.text(token_id), finite(logprob), list(self.octets(token_id)))
                    for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
                ],
            )
            for entry in entries
        ]

    def chat_logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """The same, as a field of its own."""
        return ChatLogprobs(self.chat(entries))

    def best(self, entry: TokenLogprobs) -> dict[str, float]:
        """The best tokens of one place, and the one that stands there."""
        best: dict[str, float] = {}
        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            best.setdefault(self.text(token_id), finite(logprob))
        best.setdefault(self.text(entry.token_id), finite(entry.logprob))
        return best

    def prompt(self, entries: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
        """Log probabilities of a prompt, in vLLM's words."""
        return [None if entry is None else self._place(entry) for entry in entries]

    def _place(self, entry: TokenLogprobs) -> dict[str, PromptLogprob]:
        place = {
            str(token_id): PromptLogprob(finite(logprob), rank, self.text(token_id))
            for rank, (token_id, logprob) in enumerate(
                zip(entry.top_ids, entry.top_logprobs, strict=True), 1
            )
        }
        own = PromptLogprob(finite(entry.logprob), entry.rank, self.text(entry.token_id))
        place.setdefault(str(entry.token_id), own)
        return place


class CompletionScorer:
    """Log probabilities of one growing completion, and where in its text each token begins.

    ``offset`` is where the next token begins; ``hidden`` are tokens that the text leaves out.
    """

    def __init__(self, tokens: TokenText, hidden: frozenset[int]) -> None:
        self._tokens, self._hidden = tokens, hidden
        self.offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def score_prompt(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], text: str
    ) -> CompletionLogprobs:
        """Those of an echoed prompt, whose text goes before the completion."""
        scores = self._score(token_ids, entries)
        self.offset = len(text)
        self._decoder.reset()
        return scores

    def score(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """Those of the next tokens."""
        return self._score([entry.token_id for entry in entries], entries)

    def _score(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]
    ) -> CompletionLogprobs:
        offsets = []
        for token_id in token_ids:
            offsets.append(self.offset)
            if token_id not in self._hidden:
                self.offset += len(self._decoder.decode(self._tokens.octets(token_id)))
        return CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[None if entry is None else finite(entry.logprob) for entry in entries],
            tokens=[self._tokens.text(token_id) for token_id in token_ids],
            top_logprobs=[None if entry is None else self._tokens.best(entry) for entry in entries],
        )


def joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Log probabilities of consecutive tokens as one."""
    return CompletionLogprobs(
        text_offset=[x for part in parts for x in part.text_offset],
        token_logprobs=[x for part in parts for x in part.token_logprobs],
        tokens=[x for part in parts for x in part.tokens],
        top_logprobs=[x for part in parts for x in part.top_logprobs],
    )


def finite(logprob: float) -> float:
    """A log probability that JSON can say."""
    return max(logprob, _LEAST)
