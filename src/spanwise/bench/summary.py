"""What many requests show together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from spanwise.bench.goodput import GoodputLimits
from spanwise.bench.record import RequestRecord, Run


class Distribution(msgspec.Struct, frozen=True):
    """Mean and percentiles, in the unit of the values."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class ErrorCount(msgspec.Struct, frozen=True):
    """How many requests failed in one way, and what the first of them said."""

    count: int
    message: str


class Goodput(msgspec.Struct, frozen=True):
    """Answers that kept every limit; ``fraction`` is of all requests that ended."""

    num_good: int
    fraction: float
    requests_per_s: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Latencies in seconds and of whole answers only; None where there were none.

    ``duration_s`` runs from the start of the load to the last end. ``offered_rate`` is what the
    schedule asked for, ``achieved_rate`` what was sent, in requests a second; None where answers
    set the pace, or all came at once. ``lag_s``: how much later than scheduled requests were sent.
    ``generator_cpu``: the share of one core that the generator itself took. ``num_uncounted``:
    whole answers that came without usage, whose tokens are not counted.
    """

    duration_s: float
    num_requests: int
    num_ok: int
    num_failed: int
    num_unfinished: int
    errors: dict[str, ErrorCount]
    input_tokens: int
    output_tokens: int
    num_uncounted: int
    num_pieces: int
    request_throughput: float
    input_throughput: float
    output_throughput: float
    ttft_s: Distribution | None
    itl_s: Distribution | None
    tpot_s: Distribution | None
    e2e_s: Distribution | None
    offered_rate: float | None
    achieved_rate: float | None
    lag_s: Distribution | None
    generator_cpu: float
    goodput: Goodput | None


def summarize(
    run: Run, arrivals_s: Sequence[float] | None, limits: GoodputLimits | None
) -> Summary:
    """Sum up a run; ``arrivals_s`` is its schedule, None where answers set the pace."""
    records = run.records
    ok = [record for record in records if record.failure is None]
    duration_s = max((record.end_s for record in records), default=0.0)
    input_tokens = sum(record.input_tokens or 0 for record in ok)
    output_tokens = sum(record.output_tokens or 0 for record in ok)
    scheduled = () if arrivals_s is None else arrivals_s[: len(run.sent_s)]
    return Summary(
        duration_s=duration_s,
        num_requests=run.num_requests,
        num_ok=len(ok),
        num_failed=len(records) - len(ok),
        num_unfinished=run.num_requests - len(records),
        errors=_errors(records),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        num_uncounted=sum(record.output_tokens is None for record in ok),
        num_pieces=sum(len(record.times_s) for record in ok),
        request_throughput=_per_second(len(ok), duration_s),
        input_throughput=_per_second(input_tokens, duration_s),
        output_throughput=_per_second(output_tokens, duration_s),
        ttft_s=distribution(record.ttft_s for record in ok),
        itl_s=distribution(gap for record in ok for gap in record.gaps_s),
        tpot_s=distribution(each for record in ok if (each := record.tpot_s) is not None),
        e2e_s=distribution(record.e2e_s for record in ok),
        offered_rate=_arrival_rate(scheduled),
        achieved_rate=_arrival_rate(run.sent_s) if scheduled else None,
        lag_s=distribution(_lags_s(run.sent_s, scheduled)) if scheduled else None,
        generator_cpu=run.cpu_s / run.wall_s if run.wall_s > 0 else 0.0,
        goodput=None if limits is None else _goodput(records, limits, duration_s),
    )


def distribution(values: Iterable[float]) -> Distribution | None:
    """Mean and percentiles, between two values in proportion; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Distribution(
        mean=math.fsum(ordered) / len(ordered),
        p50=_percentile(ordered, 0.50),
        p90=_percentile(ordered, 0.90),
        p95=_percentile(ordered, 0.95),
        p99=_percentile(ordered, 0.99),
        max=ordered[-1],
    )


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _per_second(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _arrival_rate(times_s: Sequence[float]) -> float | None:
    return len(times_s) / times_s[-1] if times_s and times_s[-1] > 0 else None


def _lags_s(sent_s: Iterable[float], scheduled_s: Iterable[float]) -> Iterator[float]:
    # The loop's timers count milliseconds, and may be part of one early.
    return (max(0.0, sent - due) for sent, due in zip(sent_s, scheduled_s, strict=True))


def _errors(records: Iterable[RequestRecord]) -> dict[str, ErrorCount]:
    errors: dict[str, ErrorCount] = {}
    for record in records:
        if (failure := record.failure) is not None:
            before = errors.get(failure.kind, ErrorCount(0, failure.message))
            errors[failure.kind] = ErrorCount(before.count + 1, before.message)
    return dict(sorted(errors.items(), key=lambda item: -item[1].count))


def _goodput(records: Sequence[RequestRecord], limits: GoodputLimits, duration_s: float) -> Goodput:
    good = sum(
        record.failure is None and limits.are_kept(record.ttft_s, record.tpot_s, record.e2e_s)
        for record in records
    )
    return Goodput(
        num_good=good,
        fraction=good / len(records) if records else 0.0,
        requests_per_s=_per_second(good, duration_s),
    )
