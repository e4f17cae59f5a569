"""Which grammars are refused, before anything sees them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cpu.grammar.spelling import regex, write_configs
from tests.support.tokenizers import EOS, byte_level, save

from spanwise.embedded import embedded_folder
from spanwise.engine import grammar as checking
from spanwise.engine.grammar import MAX_GRAMMAR_BYTES, GrammarChecker, check_text
from spanwise.errors import InputError, ModelError, OverloadedError
from spanwise.types.sampling import Grammar


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


def test_a_trial_that_dies_as_it_is_asked_is_no_fault_of_the_grammar(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after it was seen alive: the grammar is tried once more, in a new process."""
    for number in range(3):
        checker.check(Grammar("regex", f"before {number}[a-z]"))
        trial = checker._trial
        assert trial is not None
        trial._process.signal(signal.SIGKILL)
        trial._process.wait(10.0)
        monkeypatch.setattr(trial, "is_alive", lambda: True)
        checker.check(Grammar("regex", f"after {number}[a-z]"))
        assert checker._trial is not trial
