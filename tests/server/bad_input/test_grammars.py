"""Rows 69 to 77 where they take time: grammars that grow, that are many, and odd output."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.server.bad_input.case import CHAT, COMPLETIONS, KEYS, RESPONSES, Case, changed, short
from tests.server.contract import check_refusal, unharmed
from tests.support.server import RealServer, command_line, is_alive, until

_TRIAL = "spanwise.engine.grammar_process"
_LAG_S = 0.05
_TRIES = 3  # on a busy machine the best of them counts
_REFUSED_WITHIN_S = 5.0
_NUM_AT_ONCE = 8


def chain(length: int) -> str:
    """A name that is twice another one, which is twice another one."""
    links = [f"A{n}: A{n + 1} A{n + 1}" for n in range(length)]
    return "\n".join(["start: A0", *links, f'A{length}: "a"'])


TOO_MUCH: dict[str, dict[str, Any]] = {
    "alternatives within alternatives": {"regex": "(a|b|(c|d)*)*" * 5000},
    "two ways each": {"regex": "(a|aa)+" * 5000},
    "counts within counts": {"regex": "((a{1,100}){1,100}){1,100}"},
    "60,000 tokens": {"grammar": "start: x" + " x" * 60_000 + '\nx: "a" | "a" x'},
    "doubled 3,000 times": {"grammar": chain(3000)},
    "a multiple": {"json": {"type": "integer", "multipleOf": 9999991}},
    "3,000 fields": {"json": {"properties": {f"p{n}": {} for n in range(3000)}}},
}


@contextmanager
def steady(server: RealServer) -> Iterator[list[float]]:
    """How long others wait for an answer that takes nothing, all the while."""
    waits_s: list[float] = []
    is_over = threading.Event()

    def ask() -> None:
        with server.client() as client:
            while not is_over.is_set():
                began_s = time.monotonic()
                client.get("/ready")
                waits_s.append(time.monotonic() - began_s)
                is_over.wait(0.005)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waits_s
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize("name", TOO_MUCH)
def test_row_71_what_grows_without_end(server: RealServer, ours: httpx2.Client, name: str) -> None:
    """Refused in time, on every route that takes it; nobody's answers wait for that."""
    lags_s = []
    for _ in range(_TRIES):
        with steady(server) as waits_s:
            for path, streams in ((CHAT, False), (COMPLETIONS, True)):
                began_s = time.monotonic()
                body = changed(path, structured_outputs=TOO_MUCH[name], stream=streams)
                check_refusal(ours.post(path, json=body), 400)
                assert time.monotonic() - began_s < _REFUSED_WITHIN_S
        lags_s.append(sorted(waits_s)[-1 - len(waits_s) // 100])
        if lags_s[-1] < _LAG_S:
            break
    assert min(lags_s) < _LAG_S


def test_row_71_harms_nobody(server: RealServer) -> None:
    with unharmed(server, KEYS[0]), server.client(KEYS[0]) as client:
        for fields in list(TOO_MUCH.values())[:3]:
            check_refusal(
                client.post(COMPLETIONS, json=changed(COMPLETIONS, structured_outputs=fields)), 400
            )


def test_row_73_many_small_schemas(server: RealServer, pytestconfig: pytest.Config) -> None:
    """As many as are remembered."""
    ask_many(server, range(4096 if pytestconfig.getoption("--full") else 100))


def test_row_73_more_of_them(server: RealServer, folder: Path, pytestconfig: pytest.Config) -> None:
    """What is remembered is bounded: more leave nothing in memory, and nothing on a disk."""
    num = 6000 if pytestconfig.getoption("--full") else 100
    files = sorted(folder.rglob("*"))
    with unharmed(server, KEYS[0]):
        ask_many(server, range(10_000, 10_000 + num))
    assert sorted(folder.rglob("*")) == files


def ask_many(server: RealServer, numbers: range) -> None:
    """A schema for each number."""
    with server.client(KEYS[0]) as client, ThreadPoolExecutor(_NUM_AT_ONCE) as pool:

        def ask(number: int) -> None:
            form = {"type": "object", "properties": {f"p{number}": {"const": number}}}
            path, fields = (
                (COMPLETIONS, {"structured_outputs": {"json": form}}),
                (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a",
                                                 "schema": form}}}),
            )[number % 2]  # fmt: skip
            answer = client.post(path, json=short(path, **fields))
            assert answer.status_code == 200, answer.text

        list(pool.map(ask, numbers))


def test_a_trial_that_was_killed_is_no_fault_of_the_next_grammar(
    server: RealServer, ours: httpx2.Client
) -> None:
    body = short(COMPLETIONS, structured_outputs={"regex": "after [a-z]{5}"})
    (http,) = server.http()
    (trial,) = [each for each in http.children() if _TRIAL in command_line(each)]
    trial.kill()
    assert until(lambda: not is_alive(trial))
    assert ours.post(COMPLETIONS, json=body).status_code == 200


@pytest.mark.parametrize(
    "text", ["__import__('os').system('id')", "[f(x=__import__('os'))]", '{"name": "f"}']
)
def test_row_77_output_that_looks_like_a_call(ours: httpx2.Client, text: str) -> None:
    """Written by the model where no tool may be called, it is text."""
    said = {"structured_outputs": {"choice": [text]}, "max_tokens": 100}
    tool = {"type": "function", "function": {"name": "f"}}
    for more in ({}, {"tools": [tool], "tool_choice": "none"}):
        answer = ours.post(CHAT, json=changed(CHAT, **said, **more))
        (choice,) = answer.raise_for_status().json()["choices"]
        assert choice["message"]["content"] == text
        assert not choice["message"].get("tool_calls")
        streamed = Case(77, text, CHAT, changed(CHAT, **said, **more), status=200)
        assert streamed.check(streamed.ask(ours, streams=True)) is None
