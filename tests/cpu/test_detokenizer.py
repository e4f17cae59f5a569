from __future__ import annotations

import itertools
import random

import pytest

from spanwise.embedded import EMBEDDED
from spanwise.engine.detokenizer import Detokenizer
from spanwise.engine.prompt import read_prompt
from spanwise.engine.tokenizer import Tokenizer
from spanwise.errors import InputError

TEXT = 'def naïve(x):\n    return "日本語 🙂🙂 — ﷽"  # \U0001f468\u200d\U0001f469\n\tx  =  1\n'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(EMBEDDED["spanwise/tiny-dense"])


def test_text_grows_without_half_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    detokenizer = Detokenizer(tokenizer, True, (), 0)
    shown = ""
    for token_id in ids:
        detokenizer.add([token_id])
        assert detokenizer.text.startswith(shown)
        assert "\N{REPLACEMENT CHARACTER}" not in detokenizer.text
        shown = detokenizer.text
    detokenizer.finish()
    assert detokenizer.text == TEXT


def test_a_text_that_ends_in_half_a_character_shows_so_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂")
    detokenizer = Detokenizer(tokenizer, True, (), 0)
    detokenizer.add(ids[:-1])
    assert detokenizer.text == "a"
    detokenizer.finish()
    assert detokenizer.text.startswith("a") and detokenizer.text != "a🙂"


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_is_found_across_token_borders(tokenizer: Tokenizer, seed: int) -> None:
    chosen = random.Random(seed)
    begin = chosen.randrange(1, len(TEXT) - 6)
    stop = TEXT[begin : begin + chosen.randrange(1, 6)]
    first = TEXT.find(stop)
    detokenizer = Detokenizer(tokenizer, True, ("never there", stop), 0)
    for token_id in tokenizer.encode(TEXT):
        detokenizer.add([token_id])
    detokenizer.finish()
    assert detokenizer.stopped_by == stop
    assert detokenizer.text == TEXT[:first]


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x = 1\nx = 1\nx = 1\n")
    detokenizer = Detokenizer(tokenizer, True, ("x = 1",), len(ids))
    for token_id in ids[:-1]:
        assert detokenizer.add([token_id]) is None
    assert detokenizer.num_tokens == len(ids) - 1


def test_special_tokens_are_hidden_or_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    hidden, shown = (Detokenizer(tokenizer, skip, (), 0) for skip in (True, False))
    for detokenizer in (hidden, shown):
        detokenizer.add(ids)
        detokenizer.finish()
    assert "hi" in hidden.text and "<|" not in hidden.text
    assert "<|im_start|>" in shown.text


@pytest.mark.parametrize(
    "prompt",
    [
        {},
        {"prompt": "a", "prompt_token_ids": [1]},
        {"prompt": 3},
        {"text": "a"},
        {"prompt_token_ids": "abc"},
        {"prompt_token_ids": [1.5]},
        {"prompt_token_ids": [True]},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"content": "no role"}]},
        ["a"],
    ],
    ids=str,
)
def test_prompts_that_cannot_be_are_refused_in_one_line(
    prompt: object, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InputError) as error:
        read_prompt(prompt, tokenizer)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_the_three_kinds_of_prompt(tokenizer: Tokenizer) -> None:
    assert read_prompt("ab", tokenizer) == ("ab", tokenizer.encode("ab"))
    assert read_prompt({"prompt": "ab"}, tokenizer) == ("ab", tokenizer.encode("ab"))
    assert read_prompt({"prompt_token_ids": [5, 6]}, tokenizer) == (None, [5, 6])
    text, ids = read_prompt({"messages": [{"role": "user", "content": "hi"}]}, tokenizer)
    assert text is None and len(ids) > 3


class Bytes:
    """A tokenizer whose tokens are given byte strings."""

    exists = True

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens

    def decode(self, token_ids: list[int], _: bool) -> str:
        return b"".join(self.tokens[i] for i in token_ids).decode(errors="replace")


def test_a_stop_string_before_half_a_character_is_seen_at_once() -> None:
    tokenizer = Bytes(b"ab", b"END\xe4", b"x")
    detokenizer = Detokenizer(tokenizer, True, ("END",), 0)  # type: ignore[arg-type]
    assert detokenizer.add([0, 1, 2]) == "END"
    assert (detokenizer.text, detokenizer.num_tokens) == ("ab", 2)


def test_bytes_that_never_become_a_character_are_not_held_for_ever() -> None:
    detokenizer = Detokenizer(Bytes(b"a", b"\xff"), True, (), 0)  # type: ignore[arg-type]
    detokenizer.add([0, *[1] * 20])
    assert len(detokenizer.text) >= 17


def test_tokens_that_each_end_in_half_a_character_lose_none() -> None:
    text = "日本語日本語日本語"
    raw = text.encode()
    cuts = [0, *range(1, len(raw), 3), len(raw)]
    tokens = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    detokenizer = Detokenizer(Bytes(*tokens), True, (), 0)  # type: ignore[arg-type]
    detokenizer.add(range(len(tokens)))
    detokenizer.finish()
    assert detokenizer.text == text


def test_half_a_surrogate_pair_is_no_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="surrogate"):
        read_prompt("a\ud800b", tokenizer)
