"""What a grammar allows, and how an answer ends."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.cpu.grammar.spelling import regex, spellings, write_configs
from tests.support.tiny_models import VOCAB
from tests.support.tokenizers import EOS, NUM_TOKENS, byte_level, save, sentencepiece, unigram

from spanwise.errors import ModelError
from spanwise.runner import grammar as matching
from spanwise.runner.grammar import AnswerMatcher, end_token_ids, load_tokenizer
from spanwise.types.sampling import Grammar

TOKENIZERS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram}
LETTER_A = 3 + ord("a") - 33


@pytest.fixture(scope="module", params=TOKENIZERS)
def spelled(request: pytest.FixtureRequest, root: Path) -> tuple[str, list[str]]:
    """A folder with a tokenizer, and what each of its tokens spells."""
    tokenizer = TOKENIZERS[request.param]()
    folder = root / request.param
    folder.mkdir()
    write_configs(folder, eos_token_id=EOS)
    save(tokenizer, folder)
    return str(folder), spellings(tokenizer)


def ids_of(allowed: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(allowed) for bit in range(8) if byte >> bit & 1}


def matcher_of(
    folder: str, grammar: Grammar, stops: Sequence[int] = (EOS,), ends: Sequence[int] = (EOS,)
) -> AnswerMatcher:
    return AnswerMatcher(load_tokenizer(folder), grammar, stops, ends)


# ---- what is allowed


LONG = "one (1-2) cd ff ll"  # of more tokens than the tokenizer would cut a text to
WORDS = [
    "a",
    "ab",
    "abc",
    "abcab",
    'x"y',
    "z z",
    "{}",
    '{"a":1}',
    '{"a":12}',
    "ffe",
    "ff",
    "1-2",
    LONG,
]
AS_REGEX = "|".join(re.escape(word).replace("\\ ", " ").replace("\\-", "-") for word in WORDS)
LANGUAGES = {
    "regex": regex(AS_REGEX),
    "lark": Grammar("lark", "start: " + " | ".join(json.dumps(word) for word in WORDS)),
}


@pytest.mark.parametrize("kind", LANGUAGES)
def test_what_is_allowed_is_what_the_language_goes_on_with(
    kind: str, spelled: tuple[str, list[str]]
) -> None:
    """Every way to write every word, walked token by token."""
    folder, pieces = spelled
    open_ends: list[list[int]] = [[]]
    finished: set[str] = set()
    while open_ends:
        output = open_ends.pop()
        text = "".join(pieces[token] for token in output)
        allowed = ids_of(matcher_of(folder, LANGUAGES[kind]).allowed(output, VOCAB))
        assert (EOS in allowed) == (text in WORDS)
        if EOS in allowed:
            finished.add(text)
        following = allowed - {EOS}
        for token in following:
            assert any(word.startswith(text + pieces[token]) for word in WORDS), (text, token)
        # Where several texts can follow, each of them does; a single one comes in few tokens.
        firsts = {word[len(text)] for word in WORDS if word != text and word.startswith(text)}
        assert {pieces[token][0] for token in following} == firsts
        open_ends += [[*output, token] for token in following]
    assert finished == set(WORDS)


def test_an_object_of_any_kind(spelled: tuple[str, list[str]]) -> None:
    folder, pieces = spelled
    matcher = matcher_of(folder, Grammar("json_schema", '{"type": "object"}'))
    assert {pieces[token][0] for token in ids_of(matcher.allowed([], VOCAB))} == {"{"}
    output = [pieces.index(each) for each in ("{", '"', "a", '":', "12")]
    allowed = ids_of(matcher.allowed(output, VOCAB))
    assert {pieces[token] for token in allowed} >= {",", "}", "0", " ", ".", "e"}
    assert EOS not in allowed
    output.append(pieces.index("}"))
    assert ids_of(matcher.allowed(output, VOCAB)) == {EOS}


@pytest.mark.parametrize("vocab_size", [NUM_TOKENS - 9, NUM_TOKENS, NUM_TOKENS + 1, VOCAB, 200])
def test_only_tokens_that_exist(vocab_size: int, spelled: tuple[str, list[str]]) -> None:
    """The vocabulary may be wider than the tokenizer; the matcher's own end is no token of it."""
    folder, _ = spelled
    allowed = matcher_of(folder, regex("(?s:.*)"), stops=(EOS, 150)).allowed([], vocab_size)
    assert len(allowed) == -(-vocab_size // 8)
    expected = {index for index in range(vocab_size) if 3 <= index < NUM_TOKENS} | {EOS}
    assert ids_of(allowed) == expected | ({150} if vocab_size > 150 else set())


def test_a_matcher_begun_late_allows_the_same(spelled: tuple[str, list[str]]) -> None:
    folder, _ = spelled
    grammar = Grammar("json_schema", '{"type": "object", "properties": {"ab": {"enum": ["ll"]}}}')
    steady = matcher_of(folder, grammar)
    output: list[int] = []
    for _ in range(40):
        allowed = steady.allowed(output, VOCAB)
        assert allowed == matcher_of(folder, grammar).allowed(output, VOCAB)
        assert allowed == steady.allowed(output, VOCAB)
        output.append(max(ids_of(allowed)))


# ---- how an answer ends


def test_after_the_end_there_are_only_stop_tokens(llama: Path) -> None:
    matcher = matcher_of(str(llama), regex("a"))
    assert ids_of(matcher.allowed([], VOCAB)) == {LETTER_A}
    for output in ([LETTER_A], [LETTER_A, EOS], [LETTER_A, EOS, EOS], [LETTER_A, EOS, EOS, 9]):
        assert ids_of(matcher.allowed(output, VOCAB)) == {EOS}


def test_stop_tokens_end_what_is_complete(llama: Path) -> None:
    """Also one that is ordinary text, and one that the tokenizer does not know."""
    stops = (EOS, LETTER_A, VOCAB - 1)
    grammar = regex("b+")
    letter_b = LETTER_A + 1
    matcher = matcher_of(str(llama), grammar, stops)
    assert not ids_of(matcher.allowed([], VOCAB)) & set(stops)
    assert ids_of(matcher.allowed([letter_b], VOCAB)) >= {letter_b, *stops}
    for stop in stops:
        after = matcher_of(str(llama), grammar, stops).allowed([letter_b, stop], VOCAB)
        assert ids_of(after) == set(stops)


def test_a_stop_token_that_is_text_may_stand_in_the_answer(llama: Path) -> None:
    matcher = matcher_of(str(llama), regex("[ab]{9}"), (EOS, LETTER_A))
    allowed = ids_of(matcher.allowed([], VOCAB))
    assert LETTER_A in allowed and EOS not in allowed


def test_without_stop_tokens_the_models_own_come_last(llama: Path) -> None:
    """``ignore_eos``: the end token comes where nothing else can, and only there."""
    matcher = matcher_of(str(llama), regex("aa?"), stops=(), ends=(EOS,))
    assert ids_of(matcher.allowed([LETTER_A], VOCAB)) == {LETTER_A}
    assert ids_of(matcher.allowed([LETTER_A, LETTER_A], VOCAB)) == {EOS}


def test_a_grammar_that_grew_too_large_ends_the_answer(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_MAX_LEXER_STATES", 100)
    grammar = regex("(.*a.{40})")
    first, second = matcher_of(str(llama), grammar), matcher_of(str(llama), grammar)
    begun = ids_of(second.allowed([], VOCAB))
    output: list[int] = []
    for step in range(60):
        assert ids_of(first.allowed(output, VOCAB)) | {EOS} in ({EOS}, begun | {EOS})
        output.append(LETTER_A + (step * step // 7) % 2)
    assert ids_of(first.allowed(output, VOCAB)) == {EOS}
    assert len(begun) > 90
    # A neighbour with the same grammar has limits of its own.
    assert ids_of(second.allowed([LETTER_A], VOCAB)) == begun
    assert ids_of(matcher_of(str(llama), grammar).allowed([], VOCAB)) == begun


@pytest.mark.parametrize(
    ("generation", "config", "found"),
    [
        ({"eos_token_id": [2, 4]}, {"eos_token_id": 5}, (2, 4)),
        ({}, {"eos_token_id": 5}, (5,)),
        ({"eos_token_id": 0}, {}, (0,)),
        ({}, {}, ()),
    ],
)
def test_end_tokens_are_the_models(
    generation: dict[str, Any], config: dict[str, Any], found: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_token_ids(str(tmp_path)) == found


# ---- tokenizers


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path) -> None:
    parts = json.loads(byte_level().to_str())
    parts["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(ModelError, match="decoder type"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"added_tokens": [], "model": {}}', "\xff"])
def test_a_broken_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="cannot be used with a grammar"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_configs(tmp_path, eos_token_id=EOS)
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
