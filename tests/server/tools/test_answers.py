"""Ids, parallel calls, and what is thought: what else an answer with calls depends on."""

from __future__ import annotations

import re

import pytest
from tests.server.tools.writers import (
    EVERY_FORMAT,
    FIRST,
    SECOND,
    TEMPLATES,
    THINKING_HERMES,
    TOOLS,
    WRITERS,
    hermes,
    mistral,
    parse,
)

from spanwise.server.tools import formats
from spanwise.server.tools.call import Thinking
from spanwise.server.tools.call_id import call_id
from spanwise.server.tools.events import CallStart
from spanwise.server.tools.formats import tool_format
from spanwise.server.tools.tool_format import ToolFormat


def ids(known: ToolFormat, request_id: str) -> list[str]:
    parser = known.parser(TOOLS, request_id=request_id)
    events = parser.feed(WRITERS[known.name](FIRST, SECOND)) + parser.finish()
    return [event.id for event in events if isinstance(event, CallStart)]


@EVERY_FORMAT
def test_ids_are_the_same_when_an_answer_is_replayed(known: ToolFormat) -> None:
    assert ids(known, "req-1") == ids(known, "req-1")
    assert len({*ids(known, "req-1"), *ids(known, "req-2")}) == 4
    shape = r"[a-zA-Z0-9]{9}" if known.name.startswith("mistral") else r"call_[a-zA-Z0-9]{24}"
    assert all(re.fullmatch(shape, one) for one in ids(known, "req-1"))


def test_ids_do_not_collide() -> None:
    assert (
        len({call_id(str(request), index) for request in range(99) for index in range(99)}) == 9801
    )


@EVERY_FORMAT
def test_without_parallel_calls_the_answer_ends_with_its_first(known: ToolFormat) -> None:
    text = f"{WRITERS[known.name](FIRST, SECOND)} more"
    for texts in ([text], list(text)):
        assert parse(known, texts, parallel=False) == [FIRST]
    parser = known.parser(TOOLS, parallel=False)
    parser.feed(text)
    assert parser.done and parser.num_calls == 1
    assert parser.feed("more") == parser.finish() == []


def test_what_is_thought_is_no_call() -> None:
    assert THINKING_HERMES is not None and THINKING_HERMES.thinking == Thinking()
    call = hermes(SECOND)
    for text, pieces in {
        f"<think>{call}</think>\n{call}": [f"<think>{call}</think>", SECOND],
        f"\n<think>{call}": [f"\n<think>{call}"],
        f"so <think>{call}": ["so <think>", SECOND],
        "<think>x</think>\n": ["<think>x</think>\n"],
        "<think>x</think>\n\nHi": ["<think>x</think>\n\nHi"],
    }.items():
        assert parse(THINKING_HERMES, [text]) == parse(THINKING_HERMES, text) == pieces
    opened = f"{call}</thi</think>{call}"
    for texts in ([opened], list(opened)):
        assert parse(THINKING_HERMES, texts, thinking=True) == [f"{call}</thi</think>", SECOND]


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [("<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("", False)],
)
def test_an_answer_may_begin_within_thinking(prompt: str, thinking: bool) -> None:
    assert THINKING_HERMES is not None
    assert THINKING_HERMES.is_thinking(f"assistant\n{prompt}") == thinking
    assert not formats.HERMES.is_thinking(f"assistant\n{prompt}")


def test_how_a_model_thinks_is_told_from_its_template() -> None:
    known = tool_format(TEMPLATES["mistral"] + "[THINK]{{ thoughts }}[/THINK]")
    assert known is not None and known.thinking == Thinking("[THINK]", "[/THINK]")
    text = "[THINK]" + mistral("[ARGS]")(SECOND) + "[/THINK]"
    assert parse(known, text + mistral("[ARGS]")(SECOND)) == [text, SECOND]
    assert formats.HARMONY.thinking == getattr(tool_format(TEMPLATES["harmony"]), "thinking", None)
