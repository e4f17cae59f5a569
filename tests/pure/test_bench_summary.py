"""What is made of many measured requests: percentiles, rates, goodput, errors."""

from __future__ import annotations

import statistics
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.bench.answer import Failure
from spanwise.bench.goodput import GoodputLimits, parse_goodput
from spanwise.bench.record import RequestRecord, Run
from spanwise.bench.summary import distribution, summarize
from spanwise.errors import InputError


def record(
    index: int,
    sent_s: float,
    times_s: list[float],
    num_output: int | None = None,
    failure: Failure | None = None,
) -> RequestRecord:
    return RequestRecord(
        index=index,
        sent_s=sent_s,
        times_s=array("d", times_s),
        end_s=times_s[-1] if times_s else sent_s + 1,
        input_tokens=None if num_output is None else 10,
        output_tokens=num_output,
        failure=failure,
    )


def run(records: list[RequestRecord], num_requests: int | None = None) -> Run:
    return Run(
        num_requests=len(records) if num_requests is None else num_requests,
        sent_s=[each.sent_s for each in records],
        records=records,
        wall_s=10.0,
        cpu_s=1.0,
        interrupted=False,
    )


BUSY = Failure("http 429", "too many requests")


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_percentiles_are_the_usual_ones(values: list[float]) -> None:
    found = distribution(values)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(values))
    wanted = [cuts[49], cuts[89], cuts[94], cuts[98], max(values)]
    got = [found.p50, found.p90, found.p95, found.p99, found.max]
    assert got == pytest.approx(wanted, rel=1e-9, abs=1e-6)


def test_few_values() -> None:
    assert distribution([]) is None
    one = distribution([3.0])
    assert one is not None and (one.mean, one.p50, one.p99, one.max) == (3, 3, 3, 3)


def test_latencies_of_an_answer() -> None:
    answer = record(0, 1.0, [1.5, 2.0, 3.5], num_output=5)
    assert (answer.ttft_s, answer.e2e_s, answer.tpot_s) == (0.5, 2.5, 0.5)
    assert answer.gaps_s == [0.5, 1.5]
    assert record(0, 1.0, [1.5], num_output=1).tpot_s is None
    assert record(0, 1.0, [1.5, 2.0]).tpot_s is None, "the server did not count"


def test_a_run_is_summed_up() -> None:
    records = [
        record(0, 0.0, [1.0, 2.0], num_output=3),
        record(1, 1.0, [2.0, 4.0], num_output=2),
        record(2, 2.0, [], failure=BUSY),
        record(3, 2.0, [2.5, 3.0]),
    ]
    found = summarize(run(records, num_requests=6), None, GoodputLimits(ttft_s=0.9))
    assert found.duration_s == 4.0
    assert (found.num_ok, found.num_failed, found.num_unfinished) == (3, 1, 2)
    assert (found.input_tokens, found.output_tokens, found.num_uncounted) == (20, 5, 1)
    assert (found.num_pieces, found.generator_cpu) == (6, 0.1)
    assert found.request_throughput == 3 / 4 and found.output_throughput == 5 / 4
    assert found.ttft_s is not None and found.ttft_s.mean == pytest.approx(2.5 / 3)
    assert found.itl_s is not None and found.itl_s.max == 2.0
    assert (found.errors["http 429"].count, found.errors["http 429"].message) == (1, BUSY.message)
    assert found.goodput is not None and found.goodput.num_good == 1
    assert found.goodput.fraction == 1 / 4 and found.goodput.requests_per_s == 1 / 4
    assert found.offered_rate is found.achieved_rate is found.lag_s is None


def test_the_schedule_is_held_against_what_was_sent() -> None:
    records = [record(0, 1.0, [2.0]), record(1, 2.5, [3.0])]
    found = summarize(run(records, num_requests=3), [1.0, 2.0, 900.0], None)
    assert (found.offered_rate, found.achieved_rate) == (1.0, 0.8)
    assert found.lag_s is not None and (found.lag_s.mean, found.lag_s.max) == (0.25, 0.5)


@pytest.mark.parametrize("arrivals_s", [None, [0.0], [1.0]])
def test_a_run_with_no_answer_is_summed_up(arrivals_s: list[float] | None) -> None:
    found = summarize(run([], num_requests=1), arrivals_s, GoodputLimits())
    assert (found.num_ok, found.num_unfinished, found.duration_s) == (0, 1, 0.0)
    assert found.ttft_s is found.e2e_s is found.lag_s is None


def test_errors_are_counted_by_kind() -> None:
    failures = [Failure("connect", "refused"), BUSY, Failure("http 429", "later")]
    records = [record(index, 0.0, [], failure=each) for index, each in enumerate(failures)]
    errors = summarize(run(records), None, None).errors
    assert [(kind, error.count, error.message) for kind, error in errors.items()] == [
        ("http 429", 2, "too many requests"),
        ("connect", 1, "refused"),
    ]


# --- goodput


def test_goodput_is_read() -> None:
    assert parse_goodput("ttft:500, e2e:2000.5") == GoodputLimits(ttft_s=0.5, e2e_s=2.0005)


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "itl:5", "ttft:5,ttft:6", "ttft:-5"])
def test_other_goodput_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="goodput must be milliseconds by name"):
        parse_goodput(text)


def test_every_limit_must_be_kept() -> None:
    limits = parse_goodput("ttft:500,tpot:50,e2e:2000")
    assert limits.are_kept(0.5, 0.05, 2.0)
    assert limits.are_kept(0.5, None, 2.0), "one token has no time per output token"
    assert not limits.are_kept(0.51, 0.05, 2.0)
    assert not limits.are_kept(0.5, 0.051, 2.0)
    assert not limits.are_kept(0.5, 0.05, 2.01)
