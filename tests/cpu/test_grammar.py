"""Answers that have to match a grammar: what is allowed, how they end, and that nothing else
decides them; and which grammars are refused before anything sees them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.support.driver import drive, give_few_blocks, tokens_of
from tests.support.replica import MAX_LEN, Replica
from tests.support.tiny_models import VOCAB, save_tiny_model
from tests.support.tokenizers import (
    EOS,
    NUM_TOKENS,
    byte_level,
    save,
    sentencepiece,
    unigram,
)
from tokenizers import Tokenizer

from spanwise import LLM, SamplingParams
from spanwise.embedded import embedded_folder
from spanwise.engine import grammar as checking
from spanwise.engine.grammar import MAX_GRAMMAR_BYTES, GrammarChecker, check_text
from spanwise.errors import InputError, ModelError, OverloadedError
from spanwise.runner import grammar as matching
from spanwise.runner.grammar import AnswerMatcher, end_token_ids, load_tokenizer
from spanwise.runner.mask import keep_allowed
from spanwise.runner.sampling import SampleRow, sample
from spanwise.scheduler.request import SequenceRequest
from spanwise.types.plan import StepPlan, StepResult
from spanwise.types.sampling import Grammar, SamplingSpec

TOKENIZERS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram}
LETTER_A = 3 + ord("a") - 33


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=TOKENIZERS)
def spelled(request: pytest.FixtureRequest, root: Path) -> tuple[str, list[str]]:
    """A folder with a tokenizer, and what each of its tokens spells."""
    tokenizer = TOKENIZERS[request.param]()
    folder = root / request.param
    folder.mkdir()
    write_configs(folder, eos_token_id=EOS)
    save(tokenizer, folder)
    return str(folder), spellings(tokenizer)


@pytest.fixture(scope="module")
def llama(root: Path) -> Path:
    """A tiny model with a tokenizer, and more logits than that has tokens."""
    folder = root / "llama"
    save_tiny_model("llama", folder)
    save(byte_level(), folder)
    return folder


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    with LLM("spanwise/tiny-dense", dtype="float32", max_model_len=512) as llm:
        yield llm


def write_configs(folder: Path, **generation: Any) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "generation_config.json").write_text(json.dumps(generation))


def spellings(tokenizer: Tokenizer) -> list[str]:
    pieces = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    for mark, text in (("Ġ", " "), ("▁", " "), ("Ċ", "\n"), ("<0x0A>", "\n")):
        pieces = [text if piece == mark else piece for piece in pieces]
    return pieces


def ids_of(allowed: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(allowed) for bit in range(8) if byte >> bit & 1}


def matcher_of(
    folder: str, grammar: Grammar, stops: Sequence[int] = (EOS,), ends: Sequence[int] = (EOS,)
) -> AnswerMatcher:
    return AnswerMatcher(load_tokenizer(folder), grammar, stops, ends)


def regex(text: str) -> Grammar:
    return Grammar("regex", text)


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
    open_ends, finished = [[]], set()  # type: ignore[var-annotated]
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
    steady, output = matcher_of(folder, grammar), []  # type: ignore[var-annotated]
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


# ---- the mask and everything else that changes logits


def bits(*token_ids: int, vocab_size: int = VOCAB) -> bytes:
    whole = bytearray(-(-vocab_size // 8))
    for token_id in token_ids:
        whole[token_id // 8] |= 1 << token_id % 8
    return bytes(whole)


def random_logits(rows: int, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(5)) * 3


@pytest.mark.parametrize("vocab_size", [VOCAB, 128, 70_001])
def test_each_row_has_its_own_mask(vocab_size: int) -> None:
    logits = random_logits(40, vocab_size)
    kept = logits.clone()
    chosen = [index for index in range(40) if index % 3]
    wanted = [{index, index + 30, vocab_size - 1 - index % 9} for index in chosen]
    keep_allowed(logits, chosen, [bits(*each, vocab_size=vocab_size) for each in wanted])
    for index, ids in zip(chosen, wanted, strict=True):
        assert set(logits[index].isfinite().nonzero().flatten().tolist()) == ids
        assert torch.equal(logits[index, list(ids)], kept[index, list(ids)])
    assert torch.equal(logits[::3], kept[::3])


def test_neighbours_with_and_without_a_mask_draw_what_they_draw_alone() -> None:
    logits = random_logits(60)
    rows = []
    for number in range(60):
        spec = SamplingSpec(temperature=number % 4 / 2, seed=number, top_k=number % 7, logprobs=1)
        allowed = bits(number, number + 1, number + 60) if number % 2 else None
        rows.append(SampleRow(spec, 5, (1, 2, 3, 4, 5), 3, allowed))
    tokens, logprobs = sample(logits, rows)
    for number, row in enumerate(rows):
        if row.allowed is not None:
            assert tokens[number] in {number, number + 1, number + 60}
        alone = sample(logits[number : number + 1], [row])
        assert alone == ([tokens[number]], [logprobs[number]])
    free = sample(logits, [unmasked(row) for row in rows])[0]
    assert free[::2] == tokens[::2] and free != tokens


def unmasked(row: SampleRow) -> SampleRow:
    return SampleRow(row.spec, row.position, row.token_ids, row.num_prompt)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_overrules_the_mask(temperature: float) -> None:
    """Not a bias, a penalty, a filter, nor what the model makes of the allowed tokens."""
    spec = SamplingSpec(
        temperature=temperature, logit_bias={7: 100.0, 20: -100.0, 21: -100.0}, top_k=1, top_p=0.01,
        min_p=1.0, repetition_penalty=50.0, presence_penalty=2.0, frequency_penalty=2.0,
    )  # fmt: skip
    history = (20, 20, 21, 20, 21)
    for value in (0.0, -torch.inf, torch.nan, -1e38):
        logits = random_logits(1)
        logits[0, [20, 21]] = value
        row = SampleRow(spec, 5, history, 1, bits(20, 21))
        assert sample(logits, [row])[0][0] in (20, 21)


def test_min_tokens_keeps_stop_tokens_out_unless_nothing_else_is_left() -> None:
    logits = random_logits(1)
    logits[0, EOS] = 50.0
    for temperature in (0.0, 1.0):
        spec = SamplingSpec(temperature=temperature, min_tokens=9, stop_token_ids=(EOS,))
        row = SampleRow(spec, 5, (1, 2, 3, 4, 5), 3, bits(EOS, 30, 31))
        assert sample(logits, [row])[0][0] in (30, 31)
        row = SampleRow(spec, 5, (1, 2, 3, 4, 5), 3, bits(EOS))
        assert sample(logits, [row])[0] == [EOS]


def test_log_probabilities_are_those_of_the_unmasked_distribution() -> None:
    logits = random_logits(1)
    row = SampleRow(SamplingSpec(logprobs=3), 5, (1, 2, 3, 4, 5), 3, bits(77))
    (token,), (found,) = sample(logits, [row])
    assert token == 77 and found is not None
    right = logits.log_softmax(-1)[0]
    assert found.logprob == pytest.approx(right[77].item(), abs=2e-6)
    assert found.top_ids == tuple(right.topk(3).indices.tolist())


# ---- whole answers, and that nothing but the grammar and the model decides them

SHAPES = [
    "(ab|cd|[x-z]){3,6}(12|-[0-9]{2})",
    '\\{"a":(1|12|[3-9]{2,9})\\}',
    "[a-f]{4}( [a-f]{2,4}){1,3}\\.",
]
NUM_OUTPUT = 24


def constrained() -> list[SequenceRequest]:
    """Sequences of which every fourth is free; greedy ones and others."""
    specs = [
        SamplingSpec(
            temperature=float(index % 2),
            seed=index,
            stop_token_ids=(EOS,),
            logprobs=0,
            grammar=regex(SHAPES[index % 4]) if index % 4 < 3 else None,
        )
        for index in range(12)
    ]
    return [
        SequenceRequest(
            sequence_id=index,
            prompt_token_ids=tuple(range(9, 12 + index)),
            sampling=spec,
            max_tokens=NUM_OUTPUT,
            stop_token_ids=(EOS,),
        )
        for index, spec in enumerate(specs)
    ]


@pytest.fixture(scope="module")
def alone(llama: Path) -> dict[int, list[int]]:
    """What each of them gives by itself."""
    found = {}
    for request in constrained():
        updates = drive(Replica(llama), [request])
        found[request.sequence_id] = tokens_of(updates[request.sequence_id])
    return found


def answers(replica: Replica, **options: Any) -> dict[int, list[int]]:
    updates = drive(replica, constrained(), **options)
    return {index: tokens_of(found) for index, found in updates.items()}


def test_answers_match_and_end(alone: dict[int, list[int]]) -> None:
    pieces = spellings(byte_level())
    for index, tokens in alone.items():
        if index % 4 == 3:
            assert len(tokens) == NUM_OUTPUT and max(tokens) >= NUM_TOKENS  # the free ones stray
            continue
        assert tokens[-1] == EOS and EOS not in tokens[:-1]
        text = "".join(pieces[token] for token in tokens[:-1])
        assert re.fullmatch(SHAPES[index % 4], text), text
    assert len({tuple(tokens) for tokens in alone.values()}) > 8


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_neither_neighbours_nor_the_layout_change_an_answer(
    pp: int, tp: int, llama: Path, alone: dict[int, list[int]]
) -> None:
    assert answers(Replica(llama, pp=pp, tp=tp, max_step_tokens=16)) == alone


def watched(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each sequence is introduced with an answer that has begun."""
    introduced: Counter[int] = Counter()
    execute = replica._execute

    def counting(plans: Sequence[StepPlan]) -> list[StepResult]:
        for plan in plans:
            for new in plan.lanes[0].new:
                introduced[new.sequence_id] += len(new.token_ids) > new.num_prompt
        return execute(plans)

    monkeypatch.setattr(replica, "_execute", counting)
    return introduced


def test_a_preempted_answer_goes_on_as_it_would_have(
    llama: Path, alone: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(llama, max_step_tokens=16)
    give_few_blocks(replica, 14)
    introduced = watched(replica, monkeypatch)
    assert answers(replica) == alone
    assert sum(introduced[index] > 0 for index in alone if index % 4 < 3) >= 3, introduced


@pytest.mark.parametrize("pp", [1, 2])
def test_another_epoch_goes_on_as_the_last_one_would_have(
    pp: int, llama: Path, alone: dict[int, list[int]]
) -> None:
    replica = Replica(llama, pp=pp)

    def lose_everything(round_: int) -> None:
        if round_ in (4, 9):
            replica.scheduler.restart(round_)

    assert answers(replica, between=lose_everything) == alone


def test_an_answer_resumed_elsewhere_goes_on(llama: Path, alone: dict[int, list[int]]) -> None:
    halves = {
        request.sequence_id: alone[request.sequence_id][: 3 + request.sequence_id % 4]
        for request in constrained()
    }
    resumed = [
        msgspec.structs.replace(request, output_token_ids=tuple(halves[request.sequence_id]))
        for request in constrained()
    ]
    updates = drive(Replica(llama), resumed)
    assert {index: halves[index] + tokens_of(updates[index]) for index in alone} == alone


def test_ids_used_again_begin_a_new_answer(llama: Path) -> None:
    """A dropped sequence leaves nothing of its grammar to one of the same id in another epoch."""
    replica = Replica(llama)
    first = constrained()[0]
    drive(replica, [first])
    replica.scheduler.restart(1)
    other = SamplingSpec(stop_token_ids=(EOS,), grammar=regex("[0-9]{3}"))
    changed = msgspec.structs.replace(first, sampling=other)
    tokens = tokens_of(drive(replica, [changed])[0])
    assert re.fullmatch("[0-9]{3}", byte_level().decode(tokens))


def test_an_ignored_end_comes_only_when_nothing_else_can(llama: Path) -> None:
    spec = SamplingSpec(grammar=regex("[a-c]{2,5}"))
    request = SequenceRequest(sequence_id=0, prompt_token_ids=(9, 10), sampling=spec, max_tokens=8)
    tokens = tokens_of(drive(Replica(llama), [request])[0])
    text = byte_level().decode(tokens)
    assert len(tokens) == 8 and re.fullmatch("[a-c]{5}", text)
    first_end = tokens.index(EOS)
    assert tokens[first_end:] == [EOS] * (8 - first_end)


def test_the_tokenizer_is_built_once_and_only_for_a_grammar(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    real = matching.LLTokenizer
    monkeypatch.setattr(matching, "LLTokenizer", lambda *a, **k: built.append(1) or real(*a, **k))
    matching._load_tokenizer.cache_clear()
    drive(
        Replica(llama, tp=2), [request for request in constrained() if not request.sampling.grammar]
    )
    assert not built
    answers(Replica(llama, tp=2))
    assert len(built) == 1


def test_json_of_a_trained_model(tiny: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
            "count": {"type": "integer", "minimum": 1, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        },
        "required": ["name", "count"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    params = SamplingParams(
        n=4, temperature=1.0, seed=3, max_tokens=120,
        grammar=Grammar("json_schema", json.dumps(schema)),
    )  # fmt: skip
    first, second = tiny.generate(["def main(", "def main("], params)
    assert first.outputs == second.outputs
    for choice in first.outputs:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.text)
        assert set(value) <= {"name", "count", "tags"}
        assert re.fullmatch("[a-z_]{1,12}", value["name"]) and 1 <= value["count"] <= 99
        assert set(value.get("tags", [])) <= {"x", "y"} and len(value.get("tags", [])) <= 3
    assert len({choice.text for choice in first.outputs}) > 1


def test_long_answers_fit_the_model(llama: Path) -> None:
    """To the very end of the model's length, where no token may follow."""
    spec = SamplingSpec(stop_token_ids=(EOS,), grammar=regex("[ab]{200}"))
    request = SequenceRequest(
        sequence_id=0, prompt_token_ids=(9, 10), sampling=spec, stop_token_ids=(EOS,)
    )
    updates = drive(Replica(llama), [request])[0]
    assert updates[-1].finish_reason == "length"
    assert set(byte_level().decode(tokens_of(updates))) <= {"a", "b"}
    assert len(tokens_of(updates)) == MAX_LEN - 2


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


# ---- which grammars are refused


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    folder = embedded_folder("spanwise/tiny-dense")
    assert folder is not None
    checker = GrammarChecker(folder)
    yield checker
    checker.close()


FINE = [
    ("json_schema", '{"type": "object"}'),
    ("json_schema", "true"),
    ("json_schema", '{"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}'),
    ("json_schema", json.dumps({"enum": [f"value {n}" for n in range(3000)]})),
    ("regex", "a/b\nc[/]"),
    ("regex", "|".join(f"word{n}" for n in range(5000))),
    ("regex", "(a|(b|(c|d)))" * 5000),
    ("regex", "[0-9]{3}-é+"),
    ("lark", 'start: "a" b\nb: /[0-9]+/ | "(" b ")"\n'),
    ("lark", "start: /(?s:.*)/ <[4]>"),
]


@pytest.mark.parametrize(("kind", "text"), FINE, ids=range(len(FINE)))
def test_what_can_be_followed_passes(checker: GrammarChecker, kind: Any, text: str) -> None:
    checker.check(Grammar(kind, text))


def chain(length: int, link: Callable[[int], str], last: str) -> str:
    first = link(0).partition(":")[0]
    return "\n".join([f"start: {first}", *(link(n) for n in range(length)), last])


REFUSED = [
    ("json_schema", '{"type": "objekt"}', "Invalid type: objekt"),
    ("json_schema", "{", "not JSON"),
    ("json_schema", "", "empty"),
    ("json_schema", "[]", "must be a JSON object"),
    ("json_schema", '"object"', "must be a JSON object"),
    ("json_schema", '{}}]}, {"lark_grammar": "start: /a/"', "not JSON"),
    ("json_schema", '{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
    ("json_schema", '{"a":[' * 100 + "1" + "]}" * 100, "recursion limit"),
    ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
    ("json_schema", '{"type": "string", "pattern": "(a"}', "unclosed group"),
    ("json_schema", '{"$ref": "http://example.com/x"}', "not present"),
    ("json_schema", '{"enum": []}', "Unsatisfiable"),
    ("json_schema", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "no text"),
    ("json_schema", '{"type": "integer", "multipleOf": 9999991}', "too complex"),
    ("json_schema", json.dumps({"properties": {f"p{n}": {} for n in range(3000)}}), "too complex"),
    ("regex", "", "empty"),
    ("regex", " \n", "empty"),
    ("regex", "(a", "unclosed group"),
    ("regex", "[a-", "unclosed character class"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", "(?<!a)b", "look-around"),
    ("regex", "(a)\\1", "backreferences"),
    ("regex", "[^\\x00-\\U0010ffff]", "no text"),
    ("regex", "\ud800", "surrogate"),
    ("regex", "a" * (MAX_GRAMMAR_BYTES + 1), "make it smaller"),
    ("regex", "(a|aa)+" * 5000, "too complex"),
    ("regex", "((a{1,100}){1,100}){1,100}", "too complex"),
    ("regex", "(a|b|(c|d)*)*" * 5000, "cannot be used"),
    ("lark", "", "empty"),
    ("lark", "start: /a/ x", "line 1, column 8: unknown name"),
    ("lark", "begin: /a/", "start"),
    ("lark", "start: x\nx: /(?=a)/", "line 2, column 4: look-around"),
    ("lark", "start: start", "no text"),
    ("lark", "start: <|nothing|>", "unknown special token"),
    ("lark", "start: <[4096]>", "no text"),
    ("lark", "start: <[4097]>", "too large"),
    ("lark", '{"grammars": []}', "expecting rule"),
    ("lark", "start: " + "(" * 1000 + '"a"' + ")" * 1000, "nested"),
    ("lark", chain(4500, lambda n: f'r{n}: "a{n}" r{n + 1} | "b"', 'r4500: "x"'), "too complex"),
    ("lark", chain(3000, lambda n: f"A{n}: A{n + 1} A{n + 1}", 'A3000: "a"'), "cannot be used"),
    ("lark", "start: " + " | ".join(f'"w{n}"' for n in range(5000)), "too complex"),
    ("lark", "start: x" + " x" * 70_000 + '\nx: "a"', "make it smaller"),
    ("prose", "anything", "one of json_schema, regex, lark"),
]


@pytest.mark.parametrize(("kind", "text", "said"), REFUSED, ids=range(len(REFUSED)))
def test_the_rest_is_refused_in_a_line_and_in_time(
    checker: GrammarChecker, kind: Any, text: str, said: str
) -> None:
    checker.check(regex("a"))  # the process runs
    started = time.monotonic()
    with pytest.raises(InputError) as refused:
        checker.check(Grammar(kind, text))
    assert time.monotonic() - started < 5
    message = str(refused.value)
    assert said in message and "\n" not in message and len(message) < 320
    checker.check(regex("ab"))  # whatever became of the process


def test_a_check_holds_up_no_other_thread(checker: GrammarChecker) -> None:
    gaps, done = [0.0], threading.Event()

    def tick() -> None:
        last = time.monotonic()
        while not done.wait(0.001):
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    checker.check(regex("a"))
    thread = threading.Thread(target=tick)
    thread.start()
    with pytest.raises(InputError):
        checker.check(Grammar("json_schema", '{"multipleOf": 9999991, "type": "integer"}'))
    done.set()
    thread.join()
    assert len(gaps) > 200
    assert sorted(gaps)[-len(gaps) // 100] < 0.05


def test_checks_from_many_threads(checker: GrammarChecker) -> None:
    results: dict[int, str] = {}

    def check(number: int) -> None:
        try:
            checker.check(regex(f"[a-z]{{{number}}}" + ("(" if number % 2 else "")))
            results[number] = ""
        except InputError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=check, args=(number,)) for number in range(1, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(("unclosed group" in said) == bool(number % 2) for number, said in results.items())
    assert len(results) == 39


def test_who_waits_too_long_for_others_is_told(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_PATIENCE_S", 0.05)
    with checker._lock, pytest.raises(OverloadedError) as refused:
        checker.check(regex("a"))
    assert refused.value.retry_after_s > 0


def test_verdicts_are_remembered_and_forgotten(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    real = GrammarChecker._try

    def counted(self: GrammarChecker, grammar: Grammar) -> str | None:
        tried.append(grammar.text)
        return real(self, grammar)

    monkeypatch.setattr(GrammarChecker, "_try", counted)
    monkeypatch.setattr(checking, "_NUM_REMEMBERED", len(checker._problems) + 3)
    for _ in range(3):
        checker.check(regex("only once"))
        with pytest.raises(InputError):
            checker.check(regex("(only once"))
    assert tried == ["only once", "(only once"]
    for number in range(20):
        checker.check(regex(f"word {number}"))
    assert len(checker._problems) <= checking._NUM_REMEMBERED


def test_a_model_without_an_end_needs_a_stop_token(tmp_path: Path) -> None:
    write_configs(tmp_path)
    save(byte_level(), tmp_path)
    checker = GrammarChecker(tmp_path)
    try:
        with pytest.raises(InputError, match="stop_token_ids"):
            checker.check(regex("a"))
        checker.check(regex("a"), stop_token_ids=(7,))
    finally:
        checker.close()
        checker.close()


def test_a_model_whose_tokenizer_cannot_be_used(tmp_path: Path) -> None:
    write_configs(tmp_path, eos_token_id=EOS)
    (tmp_path / "tokenizer.json").write_text("{}")
    checker = GrammarChecker(tmp_path)
    for _ in range(2):
        with pytest.raises(ModelError, match="cannot be used with a grammar"):
            checker.check(regex("a"))
    checker.close()


def test_checking_imports_no_torch() -> None:
    program = (
        "import sys, spanwise.engine.grammar\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr


def test_what_can_be_said_at_once_needs_no_process() -> None:
    check_text(regex("(a"))
    with pytest.raises(InputError, match="empty"):
        check_text(regex(""))
