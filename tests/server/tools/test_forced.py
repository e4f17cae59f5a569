"""Answers that must call: what is forced is what models write, and is read back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.server.tools.writers import (
    EVERY_FORMAT,
    REQUIRED,
    SECOND,
    THINKING_HERMES,
    TOOLS,
    WEATHER,
    WRITERS,
    dumps,
    hermes,
    parse,
    pythonic,
)
from tokenizers import AddedToken, Tokenizer

from spanwise.embedded import EMBEDDED
from spanwise.server.tools import formats
from spanwise.server.tools.call import Thinking
from spanwise.server.tools.tool import MAX_TOOLS, Tool, ToolChoice
from spanwise.server.tools.tool_format import ToolFormat

EOS = (2, 4)


@cache
def tokenizer(marks: tuple[str, ...]) -> tuple[Tokenizer, LLTokenizer, dict[str, int]]:
    """The embedded tokenizer, with the marks as tokens of their own."""
    folder = Path(next(iter(EMBEDDED.values())))
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.add_special_tokens([AddedToken(mark, special=True) for mark in marks[::2]])
    found.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks[1::2]])
    added = {token.content: i for i, token in found.get_added_tokens_decoder().items()}
    return found, LLTokenizer(found.to_str(), eos_token=list(EOS)), added


@dataclass(frozen=True)
class Forced:
    """A grammar with a tokenizer to try it on."""

    encoder: Tokenizer
    tokens: LLTokenizer
    grammar: str

    def accepts(self, text: str) -> bool:
        """Whether a whole answer may be this."""
        matcher = LLMatcher(self.tokens, self.grammar)
        ids = self.encoder.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def walk(self, seed: int, max_tokens: int = 120) -> str | None:
        """A random answer, None for one that found no end."""
        matcher, drawn, weights = (
            LLMatcher(self.tokens, self.grammar),
            random.Random(seed),
            _weights(),
        )
        ids: list[int] = []
        while len(ids) < max_tokens:
            allowed = [i for i, bias in enumerate(matcher.compute_logit_bias()) if bias]
            assert allowed, matcher.get_error()
            # The marks come after the vocabulary that has weights.
            [token] = drawn.choices(allowed, [weights.get(i, HEAVY) for i in allowed])
            assert matcher.consume_token(token)
            if token not in EOS:
                ids.append(token)
            if matcher.is_stopped():
                text: str = self.encoder.decode(ids, skip_special_tokens=False)
                return text
        return None


HEAVY = 300


@cache
def _weights() -> dict[int, int]:
    """How likely a walk takes a token: strings and lists have to come to an end."""
    encoder, _, _ = tokenizer(())
    texts = {i: encoder.decode([i]) for i in range(encoder.get_vocab_size()) if i not in EOS}
    return {
        i: HEAVY if text[:1] == "<" else 100 if text and set(text) <= set('"}], ') else 1
        for i, text in texts.items()
    }


def forced(
    known: ToolFormat,
    choice: ToolChoice = REQUIRED,
    parallel: bool = True,
    *,
    tools: Sequence[Tool] = TOOLS,
    own_tokens: bool = False,
    thinking: bool = False,
) -> Forced:
    marks = known.marks
    if own_tokens and known.thinking == Thinking():
        marks = (*marks, "<think>", "</think>")
    encoder, tokens, added = tokenizer(marks if own_tokens else ())
    grammar = known.grammar(tools, choice, parallel, added_tokens=added, thinking=thinking)
    assert grammar.kind == "lark"
    compiled = LLMatcher.grammar_from_lark(grammar.text)
    assert LLMatcher.validate_grammar(compiled, tokens) == ""
    return Forced(encoder, tokens, compiled)


OWN_TOKENS = pytest.mark.parametrize("own_tokens", [False, True], ids=["text", "tokens"])
# What a model is held to write: JSON's strings are Python's too.
FORCED_WRITERS = {**WRITERS, "pythonic": partial(pythonic, literal=dumps)}
TYPICAL = ("get_weather", {"city": "Zürich\n5", "days": 2, "unit": "F", "near": {"x": 1.5}})
ONE_CALL = {"llama_json", "harmony"}


@EVERY_FORMAT
@OWN_TOKENS
def test_a_forced_call_is_one_that_models_write(known: ToolFormat, own_tokens: bool) -> None:
    write = FORCED_WRITERS[known.name]
    both = forced(known, own_tokens=own_tokens)
    assert both.accepts(write(TYPICAL)) and both.accepts(write(SECOND))
    assert both.accepts(write(TYPICAL, SECOND)) == (known.name not in ONE_CALL)
    for wrong in (
        "Hello",
        "",
        f"Hello {write(SECOND)}",
        write(("nowhere", {})),
        write(("now", {"a": "b"})),
        write(("get_weather", {"days": 2})),
        write(("get_weather", {"city": "a", "days": "two"})),
        write(("get_weather", {"city": "a", "days": 2, "unit": "K"})),
    ):
        assert not both.accepts(wrong), wrong


@EVERY_FORMAT
@OWN_TOKENS
def test_a_named_function_is_called_once(known: ToolFormat, own_tokens: bool) -> None:
    write = FORCED_WRITERS[known.name]
    named = forced(known, ToolChoice("named", "now"), own_tokens=own_tokens)
    assert named.accepts(write(SECOND))
    assert not named.accepts(write(TYPICAL))
    assert not named.accepts(write(SECOND, SECOND))


@EVERY_FORMAT
def test_without_parallel_calls_one_is_forced(known: ToolFormat) -> None:
    write = WRITERS[known.name]
    single = forced(known, parallel=False)
    assert single.accepts(write(SECOND))
    assert not single.accepts(write(SECOND, SECOND))


@EVERY_FORMAT
@OWN_TOKENS
def test_whatever_is_forced_is_read_back(known: ToolFormat, own_tokens: bool) -> None:
    both = forced(known, own_tokens=own_tokens)
    texts = [text for seed in range(6) if (text := both.walk(seed)) is not None]
    assert texts
    for text in texts:
        pieces = parse(known, [text])
        thought = [piece for piece in pieces if isinstance(piece, str)]
        assert len(pieces) > len(thought)
        # Only harmony may think first here, and thoughts are text.
        assert all(piece.startswith("<|channel|>analysis") for piece in thought), text


@OWN_TOKENS
def test_a_model_may_think_before_it_must_call(own_tokens: bool) -> None:
    known = THINKING_HERMES
    assert known is not None
    call, free = hermes(SECOND), forced(known, own_tokens=own_tokens)
    assert free.accepts(call) and free.accepts(f"<think>\nhm\n</think>\n\n{call}")
    assert not free.accepts(f"hm</think>{call}")
    opened = forced(known, own_tokens=own_tokens, thinking=True)
    assert opened.accepts(f"hm\n</think>\n\n{call}")
    assert not opened.accepts(call)


STRANGE = {"type": "object", "properties": {"a": {"type": "string", "format": "postcode"}}}


def test_what_cannot_be_enforced_is_refused_only_where_it_must_be() -> None:
    forced(formats.HERMES, tools=[Tool("f", STRANGE)])
    _, tokens, added = tokenizer(())
    strict = formats.HERMES.grammar([Tool("f", STRANGE, strict=True)], REQUIRED, added_tokens=added)
    assert "postcode" in LLMatcher.validate_grammar(
        LLMatcher.grammar_from_lark(strict.text), tokens
    )


@EVERY_FORMAT
def test_as_many_tools_as_there_may_be_can_be_forced(known: ToolFormat) -> None:
    tools = [Tool(f"tool_{i}", WEATHER.parameters) for i in range(MAX_TOOLS)]
    many = forced(known, tools=tools, parallel=False)
    assert many.accepts(FORCED_WRITERS[known.name](("tool_127", TYPICAL[1])))


@EVERY_FORMAT
def test_names_and_values_of_any_spelling_can_be_forced(known: ToolFormat) -> None:
    schema = {
        "type": "object",
        "properties": {'é-"key': {"enum": ['a "b" \\ \n☃', "</x>", 5, None]}, "b": True},
        "required": ['é-"key'],
        "x-guidance": {"whitespace_flexible": True},
    }
    tool = Tool("a-b", schema)
    for value in ('a "b" \\ \n☃', "</x>", 5, None):
        call = ("a-b", {'é-"key': value})
        text = FORCED_WRITERS[known.name](call)
        assert forced(known, tools=[tool]).accepts(text)
        if known.name != "pythonic":  # a quote is in no keyword
            assert parse(known, [text], [tool]) == [call]
