"""What a caller may ask of sampling, and what of it travels to the workers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from spanwise.errors import InputError

MAX_SEED = 2**63 - 1
_MAX_CHOICES = 64


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an answer's text must match: a JSON schema, a regular expression, or a Lark grammar.

    The schema ``{"type": "object"}`` asks for any JSON object.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request is sampled. Names and meanings are the field's own.

    A field left at ``None`` takes the model's ``generation_config.json`` value where it has one
    (temperature, top_p, top_k, min_p, repetition_penalty), else the neutral value.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        """Raise InputError for a value outside its range."""
        _whole("n", self.n, 1, _MAX_CHOICES)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _whole("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _whole("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _whole("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}; lower it"
            )
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _whole("logprobs", self.logprobs, -1, 2**31 - 1)
        _whole("prompt_logprobs", self.prompt_logprobs, -1, 2**31 - 1)
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise InputError(f"stop must be non-empty strings, got {text!r:.80}")
        for token_id in self.stop_token_ids or ():
            _whole("stop_token_ids", token_id, 0, 2**31 - 1)
        for token_id, bias in (self.logit_bias or {}).items():
            _whole("logit_bias token id", token_id, 0, 2**31 - 1)
            _number(f"logit_bias of token {token_id}", bias, -100.0, 100.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty where none was given."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class SamplingSpec(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What the workers need to draw one sequence's tokens: every value resolved, seed included.

    A draw is a pure function of these values, the sequence's tokens and the position: no generator
    state. ``top_k`` 0 and ``top_p`` 1.0 mean off; ``temperature`` 0.0 means greedy. ``logprobs``:
    -1 for none, else how many of the best tokens to report (0: only the drawn one's);
    ``vocab`` tokens at most. ``min_tokens`` keeps ``stop_token_ids`` (EOS included) from being
    drawn until so many output tokens exist.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = -1
    prompt_logprobs: int = -1
    grammar: Grammar | None = None


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r:.80}")


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    if value is None:
        return
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (above and value == low):
        border = f"above {low:g} and" if above else f"from {low:g}"
        raise InputError(f"{name} must be a number {border} up to {high:g}, got {value!r:.80}")
