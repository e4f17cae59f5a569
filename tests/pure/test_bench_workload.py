"""What a measurement sends and when: the same for the same seed, and as asked."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.bench.arrivals import poisson_arrivals
from spanwise.bench.lengths import parse_lengths
from spanwise.bench.prompts_file import read_prompts
from spanwise.bench.settings import ServeSettings
from spanwise.bench.workload import measured_bodies, warmup_bodies
from spanwise.errors import InputError


def settings(**changes: Any) -> ServeSettings:
    fields = {
        "base_url": "http://localhost:8000",
        "model": None,
        "endpoint": "completions",
        "num_requests": 20,
        "request_rate": math.inf,
        "concurrency": None,
        "input_len": parse_lengths("--input-len", "4:9"),
        "output_len": parse_lengths("--output-len", "3"),
        "prompts": None,
        "ignore_eos": True,
        "extra_body": {},
        "seed": 0,
        "num_warmup": 2,
        "timeout_s": 5.0,
        "goodput": None,
    }
    return ServeSettings(**(fields | changes))


def bodies(asked: ServeSettings, vocab_size: int | None = 99, **more: Any) -> list[dict[str, Any]]:
    return [json.loads(body) for body in measured_bodies(asked, "m", vocab_size, [], **more)]


# --- arrivals


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson_arrivals(20_000, 50.0, seed=3)
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert min(gaps) >= 0
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert spread == pytest.approx(1 / 50, rel=0.05), "an exponential's mean is its spread"


def test_the_seed_decides_the_arrivals() -> None:
    assert poisson_arrivals(9, 2.0, 1) == poisson_arrivals(9, 2.0, 1)
    assert poisson_arrivals(9, 2.0, 1) != poisson_arrivals(9, 2.0, 2)
    assert poisson_arrivals(3, math.inf, 1) == [0.0, 0.0, 0.0]


@given(st.floats(0.01, 1e4), st.integers())
def test_another_rate_scales_the_same_arrivals(rate: float, seed: int) -> None:
    scaled = [time / rate for time in poisson_arrivals(5, 1.0, seed)]
    assert poisson_arrivals(5, rate, seed) == pytest.approx(scaled)


# --- lengths


def drawn(text: str, count: int = 4000) -> Counter[int]:
    random = Random(0)
    lengths = parse_lengths("--input-len", text)
    return Counter(lengths.draw(random) for _ in range(count))


def test_lengths_are_fixed_or_of_a_range_or_mixed() -> None:
    assert set(drawn("128")) == {128}
    assert set(drawn("2:5")) == {2, 3, 4, 5}
    assert max(drawn("2:5").values()) < 1.2 * min(drawn("2:5").values())
    mix = drawn("8@3, 100:101")
    assert set(mix) == {8, 100, 101}
    assert mix[8] == pytest.approx(3000, rel=0.05)


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "x", "5:", "9:5", "5,", "5@", "5@0", "1e3", "5.5", "٣", "1" * 12]
)
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--input-len must be tokens such as 128"):
        parse_lengths("--input-len", text)


# --- bodies


def test_the_same_seed_gives_the_same_bodies() -> None:
    assert bodies(settings()) == bodies(settings())
    assert bodies(settings()) != bodies(settings(seed=1))
    assert bodies(settings())[:5] == bodies(settings(num_requests=5)), "more only adds"


def test_completions_take_ids_of_the_vocabulary() -> None:
    found = bodies(settings(num_requests=300))
    assert {len(body["prompt"]) for body in found} == {4, 5, 6, 7, 8, 9}
    ids = {token for body in found for token in body["prompt"]}
    assert (min(ids), max(ids)) == (10, 98)
    assert max(max(body["prompt"]) for body in bodies(settings(num_requests=300), None)) == 255
    lengths = [len(body["prompt"]) for body in found]
    assert lengths == [len(body["prompt"]) for body in bodies(settings(num_requests=300), 5000)]


def test_a_body_asks_for_what_is_measured() -> None:
    (body,) = bodies(settings(num_requests=1, input_len=parse_lengths("x", "2")))
    assert len(body.pop("prompt")) == 2
    assert body == {
        "model": "m",
        "max_tokens": 3,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    extra = {"temperature": 0.7, "top_p": 0.9, "stream": False}
    (body,) = bodies(settings(num_requests=1, ignore_eos=False, extra_body=extra))
    assert "ignore_eos" not in body
    assert (body["temperature"], body["top_p"], body["stream"]) == (0.7, 0.9, True)


def test_a_chat_is_of_words() -> None:
    (body,) = bodies(settings(endpoint="chat", num_requests=1))
    (message,) = body["messages"]
    assert message["role"] == "user" and 4 <= len(message["content"].split()) <= 9


def test_warming_up_shows_no_prompt_that_is_measured() -> None:
    asked = settings(num_warmup=20)
    warm = [json.loads(body)["prompt"] for body in warmup_bodies(asked, "m", 99)]
    assert len(warm) == 20
    assert not [prompt for prompt in warm if prompt in [body["prompt"] for body in bodies(asked)]]


# --- a file of prompts


def test_lines_of_a_file_come_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "top_k": 5}\n\n{"prompt_token_ids": [1], "max_tokens": 9}\n')
    lines = read_prompts(str(path), "completions")
    asked = settings(num_requests=3)
    found = [json.loads(body) for body in measured_bodies(asked, "m", None, lines)]
    assert [body["prompt"] for body in found] == ["a", [1], "a"]
    assert [body["max_tokens"] for body in found] == [3, 9, 3]
    assert [body.get("top_k") for body in found] == [5, None, 5]


def test_a_chat_takes_text_as_a_message(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    contents = [line["messages"][0]["content"] for line in read_prompts(str(path), "chat")]
    assert contents == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "endpoint", "said"),
    [
        ("", "chat", "holds no prompts"),
        ('{"prompt": "a"}\n{', "chat", "line 2: .*one JSON object a line"),
        ("[5]", "chat", "line 1: .*one JSON object a line"),
        ('{"prompt": [5]}', "chat", "line 1: the chat endpoint takes messages"),
        ('{"messages": [{}]}', "completions", "line 1: the completions endpoint takes prompt or"),
        ('{"prompt": ""}', "completions", "takes prompt or prompt_token_ids"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, endpoint: Any, said: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_prompts(str(path), endpoint)


# --- settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_url": "localhost:8000"}, "http://localhost:8000"),
        ({"base_url": "http://a b"}, "base_url"),
        ({"base_url": "http://a/?b"}, "base_url"),
        ({"concurrency": 5}, "one of request_rate and concurrency"),
        ({"request_rate": None}, "one of request_rate and concurrency"),
        ({"request_rate": 0.0}, "request_rate must be above 0"),
        ({"request_rate": math.nan}, "request_rate must be above 0"),
        ({"request_rate": None, "concurrency": 0}, "concurrency must be 1 or more"),
        ({"num_requests": 0}, "num_requests must be 1 or more"),
        ({"num_warmup": -1}, "num_warmup"),
        ({"timeout_s": math.inf}, "timeout"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings(**changes)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_as_clients_want_it(end: str) -> None:
    assert settings(base_url=f"http://h:1/x{end}").server_url == "http://h:1/x"


def test_settings_are_told_as_json() -> None:
    assert msgspec.to_builtins(settings(seed=7))["seed"] == 7
