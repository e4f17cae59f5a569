"""Many more requests than can be served, against the real server as it is by default."""

from __future__ import annotations

import math
import threading
from typing import Any

from tests.server.contract import check_refusal
from tests.server.running import running
from tests.support.server import DENSE, RealServer, serving, until

from spanwise.bench.lengths import parse_lengths
from spanwise.bench.record import RequestRecord
from spanwise.bench.serve import Watcher, measure
from spanwise.bench.settings import ServeSettings
from spanwise.control.admission import MIN_QUEUE
from spanwise.errors import OverloadedError

_NUM_SEATS, _NUM_TOKENS = 4, 24
_NUM_OFFERED, _RATE = 400, 200.0  # a tenth of it can be served where nothing else runs
_CANARY: dict[str, Any] = {
    "prompt": "def main(", "temperature": 0, "max_tokens": _NUM_TOKENS, "ignore_eos": True,
}  # fmt: skip


def offer(
    server: RealServer, number: int, rate: float, num_tokens: int = _NUM_TOKENS
) -> list[RequestRecord]:
    """Requests at random times: how each ended."""
    settings = ServeSettings(
        base_url=server.url,
        model=DENSE,
        endpoint="completions",
        num_requests=number,
        request_rate=rate,
        concurrency=None,
        input_len=parse_lengths("", "8:40"),
        output_len=parse_lengths("", str(num_tokens)),
        prompts=None,
        ignore_eos=True,
        extra_body={},
        seed=7,
        num_warmup=0,
        timeout_s=60.0,
        goodput=None,
    )
    return measure(settings, None, Watcher(lambda line: None)).run.records


def is_retryable(record: RequestRecord) -> bool:
    failure = record.failure
    assert failure is not None
    said = failure.retry_after or ""
    return failure.kind in ("http 429", "http 503") and said.isdigit() and 1 <= int(said) <= 60


def complete(server: RealServer, body: dict[str, Any]) -> Any:
    return server.complete(body).raise_for_status().json()


def test_whoever_is_taken_is_served_and_the_others_are_told_to_come_again() -> None:
    with serving("--max-num-seqs", str(_NUM_SEATS)) as server:
        expected = complete(server, _CANARY)["choices"][0]["text"]
        most, is_over = [0.0], threading.Event()

        def watch() -> None:
            while not is_over.wait(0.1):
                metrics = server.metrics()
                names = ("num_requests_running", "num_requests_waiting")
                most.append(sum(metrics[name] for name in names))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            records = offer(server, _NUM_OFFERED, _RATE)
        finally:
            is_over.set()
            watching.join()
        taken = [each for each in records if each.failure is None]
        refused = [each for each in records if each.failure is not None]
        assert len(records) == _NUM_OFFERED and len(taken) >= _NUM_SEATS
        assert len(refused) > len(taken), "or it was no overload"
        assert {each.output_tokens for each in taken} == {_NUM_TOKENS}
        assert [each.failure for each in refused if not is_retryable(each)] == []
        assert max(most) <= _NUM_SEATS + MIN_QUEUE, "the queue is short however many come"
        assert until(server.is_idle), server.metrics()
        assert server.metrics()["request_refused_total"] == len(refused)
        assert complete(server, _CANARY)["choices"][0]["text"] == expected

        # One request of more prompts than there are seats is one request.
        many = _CANARY | {"prompt": ["def main("] * (3 * _NUM_SEATS + MIN_QUEUE), "max_tokens": 2}
        assert len(complete(server, many)["choices"]) == 3 * _NUM_SEATS + MIN_QUEUE
        vectors = {"model": DENSE, "input": ["def main("] * (3 * _NUM_SEATS + MIN_QUEUE)}
        with server.client() as client:
            assert len(client.post("/v1/embeddings", json=vectors).json()["data"]) == len(
                vectors["input"]
            )


def test_a_full_server_says_so_before_it_reads_the_request() -> None:
    with running() as server, server.client() as client:
        server.engine.full = OverloadedError("all places are taken", 6.2)
        bad: dict[str, Any] = {
            "content": b"{no JSON",
            "headers": {"content-type": "application/json"},
        }
        for path in ("chat/completions", "completions", "responses", "embeddings"):
            answer = client.post(f"/v1/{path}", **bad)
            assert check_refusal(answer, 503)["code"] == "overloaded"
            assert answer.headers["retry-after"] == "7"
        assert client.post("/tokenize", json={"prompt": "def"}).status_code == 200
        # The answer to this one may be there already: that costs no place.
        bad["headers"] |= {"idempotency-key": "a"}
        assert check_refusal(client.post("/v1/completions", **bad), 400)["code"] == "invalid_json"


def test_a_queue_may_be_asked_for() -> None:
    with serving("--max-num-seqs", str(_NUM_SEATS), "--max-queue-delay", "inf") as server:
        records = offer(server, 5 * MIN_QUEUE, math.inf, num_tokens=2)
        assert [each.failure for each in records if each.failure is not None] == []
