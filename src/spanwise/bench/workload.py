"""What is sent: every request's body, made before the first is sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import msgspec

from spanwise.bench.settings import ServeSettings

# Below stand special tokens in many vocabularies; up to here every real one reaches.
_FIRST_ID = 10
_SMALL_VOCABULARY = 256
# Each is one token in most vocabularies, with the space before it.
_TEXT = (
    "time year people way day man thing world life hand part child eye place work week case point "
    "company number group problem fact right study book word business issue side kind head house "
    "service friend father power hour game line end member law car city name team minute idea body "
    "back parent face level office door health person art war history party result change morning"
)
_WORDS = tuple(_TEXT.split())


def needs_vocabulary(settings: ServeSettings) -> bool:
    """Whether prompts are drawn from the model's vocabulary."""
    return settings.endpoint == "completions"


def measured_bodies(
    settings: ServeSettings,
    model: str,
    vocab_size: int | None,
    lines: Sequence[Mapping[str, Any]],
) -> list[bytes]:
    """Bodies of the requests to measure; the same for the same arguments.

    Prompts for completions are token ids, so their lengths are exact; those for chat are words,
    about one token each. Lines of a file come instead, in order and from the first again after the
    last; where a line does not say how long its answer is, that is drawn.
    """
    drawn = _drawn(settings, vocab_size, "measured")
    fields = [next(drawn) for _ in range(settings.num_requests)]
    if lines:
        fields = [
            {"max_tokens": each["max_tokens"], **lines[index % len(lines)]}
            for index, each in enumerate(fields)
        ]
    return [_body(settings, model, each) for each in fields]


def warmup_bodies(settings: ServeSettings, model: str, vocab_size: int | None) -> list[bytes]:
    """Bodies that warm up: other prompts than the measured ones, so that no cache knows those."""
    drawn = _drawn(settings, vocab_size, "warm-up")
    return [_body(settings, model, next(drawn)) for _ in range(settings.num_warmup)]


def _drawn(settings: ServeSettings, vocab_size: int | None, part: str) -> Iterator[dict[str, Any]]:
    """Prompts and answers' lengths without end; lengths do not depend on the vocabulary."""
    lengths, tokens = (Random(f"{part}/{what}/{settings.seed}") for what in ("lengths", "tokens"))
    high = max(vocab_size or _SMALL_VOCABULARY, _FIRST_ID + 1)
    while True:
        num_input = settings.input_len.draw(lengths)
        max_tokens = settings.output_len.draw(lengths)
        draws = (tokens.random() for _ in range(num_input))
        if settings.endpoint == "completions":
            prompt = [_FIRST_ID + int(draw * (high - _FIRST_ID)) for draw in draws]
            yield {"prompt": prompt, "max_tokens": max_tokens}
        else:
            text = " ".join(_WORDS[int(draw * len(_WORDS))] for draw in draws)
            messages = [{"role": "user", "content": text}]
            yield {"messages": messages, "max_tokens": max_tokens}


def _body(settings: ServeSettings, model: str, fields: dict[str, Any]) -> bytes:
    # No null or default for what was not asked for: strict servers refuse fields they do not know.
    ignore_eos = {"ignore_eos": True} if settings.ignore_eos else {}
    streamed = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(
        {"temperature": 0.0, **ignore_eos, **settings.extra_body, **fields, **streamed}
    )
