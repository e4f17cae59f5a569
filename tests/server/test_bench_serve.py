"""`spanwise bench serve` against a server on loopback that does what each request asks for."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.fake_openai import FakeOpenAI, serving

from spanwise.bench.lengths import parse_lengths
from spanwise.bench.report import json_report, print_report
from spanwise.bench.serve import Measurement, Watcher, measure
from spanwise.bench.settings import ServeSettings
from spanwise.errors import InputError, SpanwiseError

_TIMEOUT_S = 60.0


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with serving(FakeOpenAI()) as running:
        yield running


def settings(server: FakeOpenAI, **changes: Any) -> ServeSettings:
    fields = {
        "base_url": server.url,
        "model": None,
        "endpoint": "completions",
        "num_requests": 12,
        "request_rate": math.inf,
        "concurrency": None,
        "input_len": parse_lengths("--input-len", "8"),
        "output_len": parse_lengths("--output-len", "4:6"),
        "prompts": None,
        "ignore_eos": True,
        "extra_body": {},
        "seed": 0,
        "num_warmup": 0,
        "timeout_s": 20.0,
        "goodput": None,
    }
    return ServeSettings(**(fields | changes))


def measured(server: FakeOpenAI, notes: list[str] | None = None, **changes: Any) -> Measurement:
    note = (notes if notes is not None else []).append
    return measure(settings(server, **changes), None, Watcher(note))


# --- what is measured


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_answers_are_timed_and_counted(server: FakeOpenAI, endpoint: str) -> None:
    found = measured(server, endpoint=endpoint)
    summary = found.summary
    assert (summary.num_ok, summary.num_failed, found.model) == (12, 0, "fake")
    assert summary.output_tokens == sum(body["max_tokens"] for body in server.bodies)
    assert summary.num_pieces == summary.output_tokens
    assert server.peak == 12, "all at once"
    for record in found.run.records:
        assert 0 <= record.sent_s < record.times_s[0] <= record.times_s[-1] <= record.end_s
        assert record.end_s - record.sent_s >= 0.002 * (record.output_tokens or 99)
    assert summary.ttft_s is not None and summary.itl_s is not None
    assert summary.tpot_s is not None and summary.tpot_s.p50 >= 0.002


def test_the_same_seed_sends_the_same(server: FakeOpenAI) -> None:
    for _ in range(2):
        measured(server, concurrency=1, request_rate=None)
    assert server.bodies[:12] == server.bodies[12:]
    assert all(len(body["prompt"]) == 8 for body in server.bodies)
    assert max(token for body in server.bodies for token in body["prompt"]) > 255


def test_so_many_are_in_flight(server: FakeOpenAI) -> None:
    found = measured(server, concurrency=3, request_rate=None)
    assert server.peak == 3
    assert found.summary.lag_s is None and found.summary.num_ok == 12


def test_the_schedule_does_not_wait_for_answers(server: FakeOpenAI) -> None:
    """Each answer takes longer than all arrivals together."""
    found = measured(server, request_rate=200.0, output_len=parse_lengths("x", "100"))
    assert found.arrivals_s is not None and found.arrivals_s[-1] < 0.15
    lags = [sent - due for sent, due in zip(found.run.sent_s, found.arrivals_s, strict=True)]
    assert min(lags) > -0.002 and server.peak == 12
    assert max(found.run.sent_s) < min(record.end_s for record in found.run.records)


def test_warming_up_is_not_measured(server: FakeOpenAI) -> None:
    notes: list[str] = []
    found = measured(server, notes, num_warmup=5, num_requests=3)
    assert len(server.bodies) == 8 and found.summary.num_requests == 3
    assert notes[0].startswith("warm-up: 5 requests in ")


@pytest.mark.parametrize(
    ("behaviour", "kind", "said"),
    [
        ("busy", "http 429", "too many requests"),
        ("rude", "disconnected", ""),
        ("cut", "cut short", "finish_reason"),
        ("error", "error event", "the engine died"),
        ("silent", "timeout", "0.5 s"),
    ],
)
def test_failures_are_counted_by_kind(
    server: FakeOpenAI, behaviour: str, kind: str, said: str
) -> None:
    found = measured(server, num_requests=4, timeout_s=0.5, extra_body={"user": behaviour})
    assert (found.summary.num_ok, found.summary.num_failed) == (0, 4)
    assert list(found.summary.errors) == [kind]
    assert found.summary.errors[kind].count == 4 and said in found.summary.errors[kind].message
    assert found.summary.ttft_s is None


def test_when_to_come_again_is_kept(server: FakeOpenAI) -> None:
    found = measured(server, num_requests=2, extra_body={"user": "busy"})
    report = json.loads(json_report(found))
    assert [each["retry_after"] for each in report["requests"]] == ["7", "7"]
    found = measured(server, num_requests=2, extra_body={"user": "cut"}, concurrency=1,
                     request_rate=None)  # fmt: skip
    assert [each.failure and each.failure.retry_after for each in found.run.records] == [None, None]


def test_a_shredded_stream_is_read(server: FakeOpenAI) -> None:
    found = measured(server, extra_body={"user": "shredded"})
    assert found.summary.num_ok == 12
    assert found.summary.num_pieces == found.summary.output_tokens


def test_tokens_are_not_made_up(server: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(server, extra_body={"user": "uncounted"})
    assert (found.summary.output_tokens, found.summary.num_uncounted) == (0, 12)
    assert found.summary.tpot_s is None
    print_report(found)
    assert "12 answers came without usage" in capsys.readouterr().out


def test_connections_are_used_again(server: FakeOpenAI) -> None:
    measured(server, concurrency=1, request_rate=None)
    assert server.num_connections <= 2, "the first may be the one that asked for the model"


def test_the_report_is_json(server: FakeOpenAI) -> None:
    report = json.loads(json_report(measured(server, num_requests=2)))
    assert report["settings"]["request_rate"] == "inf" and report["model"] == "fake"
    assert report["summary"]["num_ok"] == 2 and len(report["requests"]) == 2
    assert report["requests"][0]["scheduled_s"] == 0.0
    assert report["requests"][0]["ttft_s"] > 0


# --- servers


def test_a_server_of_several_models_wants_a_name(server: FakeOpenAI) -> None:
    server.models = ("one", "two")
    with pytest.raises(InputError, match=r"has one, two; choose one with --model"):
        measured(server)
    assert measured(server, model="two", num_requests=1).model == "two"
    assert server.bodies[-1]["model"] == "two"


def test_small_ids_where_no_vocabulary_is_told(server: FakeOpenAI) -> None:
    server.vocab_size = None
    measured(server)
    assert max(token for body in server.bodies for token in body["prompt"]) <= 255


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(SpanwiseError, match=r"cannot be reached: .*refused"):
            measured(FakeOpenAI.at(url))


def test_a_key_travels_in_the_header(server: FakeOpenAI) -> None:
    measure(settings(server, num_requests=1), "secret", Watcher(lambda _: None))
    assert server.keys == {"bearer secret"}


# --- the program


def command(server: FakeOpenAI, *arguments: str) -> list[str]:
    program = [sys.executable, "-m", "spanwise", "bench", "serve", "--base-url", server.url]
    return [*program, *arguments]


def test_the_program_prints_a_table(server: FakeOpenAI, tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "a", "user": "busy"}\n' + '{"prompt": "b"}\n' * 3)
    words = ("--prompts", str(prompts), "--concurrency", "2", "--output-len", "5", "--quiet")
    words += ("--json", str(tmp_path / "out.json"), "--goodput", "e2e:20000")
    answer = subprocess.run(
        command(server, *words),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        env=os.environ | {"SPANWISE_API_KEY": "secret"},
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "4 requests, 3 answered, 1 failed" in answer.stdout
    assert "time to first token" in answer.stdout and "3 (75.0%)" in answer.stdout
    assert "failed (http 429): 1, the first: too many requests" in answer.stdout
    report = (tmp_path / "out.json").read_text()
    assert json.loads(report)["summary"]["output_tokens"] == 15
    assert server.keys == {"bearer secret"} and "secret" not in report


def test_the_program_fails_where_nothing_is_answered(server: FakeOpenAI) -> None:
    words = ("--num-requests", "2", "--extra-body", '{"user": "busy"}')
    answer = subprocess.run(
        command(server, *words), capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    assert answer.returncode == 1 and "failed (http 429): 2" in answer.stdout
    assert answer.stderr == "spanwise: none of 2 requests was answered\n"


def test_ctrl_c_prints_what_was_measured(server: FakeOpenAI, tmp_path: Path) -> None:
    lengths = ("--num-requests", "50", "--concurrency", "2", "--output-len", "5@9,50000@1")
    with subprocess.Popen(
        command(server, *lengths, "--json", str(tmp_path / "out.json")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert server.is_streaming_long.wait(_TIMEOUT_S)
        program.send_signal(signal.SIGINT)
        stdout, stderr = program.communicate(timeout=_TIMEOUT_S)
    assert (program.returncode, stderr) == (130, "")
    assert "not ended when it was stopped" in stdout and "time to first token" in stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["interrupted"] and report["summary"]["num_ok"] >= 1


def test_watching_does_not_slow_it(server: FakeOpenAI) -> None:
    told: list[str] = []
    watcher = Watcher(lambda _: None, told.append)
    length = parse_lengths("x", "400")
    measure(settings(server, num_requests=2, output_len=length), None, watcher)
    assert told and all(text.startswith("0/2 ended, 0 failed, 2 in flight") for text in told)
