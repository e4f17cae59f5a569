"""A measured stream's bytes: events however they are cut, answers, and what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.bench.answer import Answer
from spanwise.bench.sse import EventSplitter

_LINE = st.binary(max_size=12).filter(lambda line: b"\n" not in line and b"\r" not in line)


def cut(stream: bytes, borders: list[int]) -> list[bytes]:
    """The stream in pieces, cut at these places."""
    places = sorted({border % (len(stream) + 1) for border in borders})
    return [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]


# --- events


@given(
    st.lists(st.lists(_LINE, min_size=1, max_size=3), max_size=8),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.sampled_from([b"", b": still here", b"event: x", b"id: 5", b"retry"]),
    st.lists(st.integers(0, 10_000), max_size=12),
)
def test_events_do_not_depend_on_where_the_bytes_are_cut(
    events: list[list[bytes]], end: bytes, other: bytes, borders: list[int]
) -> None:
    stream = b"".join(
        other + end + b"".join(b"data: " + line + end for line in lines) + end for lines in events
    )
    splitter = EventSplitter()
    # A lone CR may be half of a CR LF: the last event waits for what follows.
    pieces = [*cut(stream, borders), b":"]
    got = [data for piece in pieces for data in splitter.feed(piece)]
    assert got == [b"\n".join(lines) for lines in events]


@pytest.mark.parametrize(
    ("stream", "data"),
    [
        (b"data:x\n\n", [b"x"]),
        (b"data:  x\n\n", [b" x"]),
        (b"data\n\n", [b""]),
        (b"data: x: y\n\n", [b"x: y"]),
        (b"\n\n: nothing\n\ndatas: x\n\n", []),
        (b"data: the end is cut off\n", []),
    ],
)
def test_odd_events(stream: bytes, data: list[bytes]) -> None:
    assert EventSplitter().feed(stream) == data


# --- answers


def event(record: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(record).encode() + b"\n\n"


def piece(choice: dict[str, Any], finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, **choice, "finish_reason": finish_reason}]})


def usage(num_input: int, num_output: int) -> bytes:
    counts = {"prompt_tokens": num_input, "completion_tokens": num_output}
    return event({"choices": [], "usage": counts})


DONE = b"data: [DONE]\n\n"


def read(*parts: bytes, status: int = 200) -> Answer:
    """An answer whose parts come a second apart."""
    answer = Answer()
    for second, part in enumerate(parts, 1):
        answer.feed(status, part, float(second))
    return answer


def test_a_completion_is_timed() -> None:
    end = piece({"text": ""}, "stop")
    answer = read(piece({"text": "a"}), piece({"text": "b"}) * 2, end, usage(7, 4) + DONE)
    assert answer.failure() is None
    assert list(answer.times_s) == [1.0, 2.0, 2.0] and answer.last_s == 3.0
    assert (answer.input_tokens, answer.output_tokens) == (7, 4)


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"reasoning": "a"},
        {"reasoning_content": "a"},
        {"tool_calls": [{"index": 0}]},
    ],
)
def test_the_role_of_a_chat_is_no_token(delta: dict[str, Any]) -> None:
    role = piece({"delta": {"role": "assistant", "content": ""}})
    answer = read(role, piece({"delta": delta}), piece({"delta": {}}, "stop"), DONE)
    assert list(answer.times_s) == [2.0] and answer.failure() is None
    assert answer.output_tokens is None


def test_an_answer_without_text_has_a_first_token() -> None:
    answer = read(piece({"text": ""}), piece({"text": ""}, "length"))
    assert list(answer.times_s) == [2.0] and answer.failure() is None


def test_running_usage_counts_once() -> None:
    both = {"choices": [{"text": "a"}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    assert read(event(both), usage(3, 2) + DONE).output_tokens == 2


@pytest.mark.parametrize(
    ("parts", "kind", "said"),
    [
        ([], "no answer", "an empty body"),
        ([b'{"id": 5}'], "no answer", '{"id": 5}'),
        ([DONE], "no answer", "DONE"),
        ([piece({"text": "a"})], "cut short", "finish_reason"),
        ([event({"error": {"message": "it\ndied"}}), DONE], "error event", "it died"),
        ([event({"error": "odd"}), DONE], "error event", "odd"),
        ([b"data: {\n\n", piece({"text": "a"}, "stop"), DONE], "bad chunk", "{"),
        ([b'data: {"choices": 5}\n\n', DONE], "bad chunk", "choices"),
        ([b"data: \xff\n\n", DONE], "bad chunk", "malformed"),
    ],
)
def test_an_answer_that_is_not_whole_says_why(parts: list[bytes], kind: str, said: str) -> None:
    failure = read(*parts).failure()
    assert failure is not None and failure.kind == kind
    assert said in failure.message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "slow down"}}', "slow down"),
        (b"<h1>bad gateway</h1>", "<h1>bad gateway</h1>"),
        (b"\xff" * 5000, "\ufffd" * 200),
        (b"", "an empty body"),
    ],
)
def test_a_refusal_says_what_the_server_said(body: bytes, said: str) -> None:
    failure = read(body[:9], body[9:], status=503).failure()
    assert failure is not None and (failure.kind, failure.message) == ("http 503", said)
