"""A measurement as a table for people and as JSON for programs."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from spanwise.bench.serve import Measurement
from spanwise.bench.summary import Distribution, Summary

_LATENCIES = {
    "ttft_s": "time to first token",
    "itl_s": "inter-token latency",
    "tpot_s": "time per output token",
    "e2e_s": "end to end",
}
_COLUMNS = ("mean", "p50", "p90", "p95", "p99")
_LATE_S = 0.02
_BUSY = 0.8


def print_report(measurement: Measurement) -> None:
    """Print tables of latencies and rates, errors, and what to be careful about."""
    console = Console(highlight=False, soft_wrap=True)
    summary = measurement.summary
    console.print(_counts(measurement), markup=False)
    if summary.num_ok:
        console.print()
        console.print(_latencies(summary))
    console.print()
    console.print(_rates(summary))
    for kind, error in summary.errors.items():
        console.print(f"failed ({kind}): {error.count}, the first: {error.message}", markup=False)
    for line in _cautions(summary):
        console.print(f"note: {line}", markup=False)


def _counts(measurement: Measurement) -> str:
    summary = measurement.summary
    parts = [f"{summary.num_ok} answered", f"{summary.num_failed} failed"]
    if summary.num_unfinished:
        parts.append(f"{summary.num_unfinished} not ended when it was stopped")
    return (
        f"{measurement.model} at {measurement.settings.base_url}: {summary.num_requests} requests, "
        f"{', '.join(parts)}; {summary.duration_s:.2f} s"
    )


def _latencies(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("milliseconds", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for field, name in _LATENCIES.items():
        table.add_row(name, *_milliseconds(getattr(summary, field)))
    if summary.lag_s is not None:
        table.add_row("sent later than scheduled", *_milliseconds(summary.lag_s))
    return table


def _milliseconds(times_s: Distribution | None) -> list[str]:
    if times_s is None:
        return ["-"] * len(_COLUMNS)
    return [f"{getattr(times_s, column) * 1000:,.2f}" for column in _COLUMNS]


def _rates(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    rows = {
        "requests/s": summary.request_throughput,
        "input tokens/s": summary.input_throughput,
        "output tokens/s": summary.output_throughput,
        "requests/s offered": summary.offered_rate,
        "requests/s sent": summary.achieved_rate,
    }
    for name, rate in rows.items():
        if rate is not None:
            table.add_row(name, f"{rate:,.2f}")
    if (goodput := summary.goodput) is not None:
        table.add_row("good requests/s", f"{goodput.requests_per_s:,.2f}")
        table.add_row("good requests", f"{goodput.num_good} ({goodput.fraction:.1%})")
    table.add_row("generator, of a core", f"{summary.generator_cpu:.0%}")
    return table


def _cautions(summary: Summary) -> list[str]:
    cautions = []
    if summary.num_uncounted:
        cautions.append(f"{summary.num_uncounted} answers came without usage; not in the tokens")
    counted = summary.output_tokens and not summary.num_uncounted
    if counted and summary.num_pieces < 0.9 * summary.output_tokens:
        each = summary.output_tokens / summary.num_pieces
        cautions.append(f"a piece holds {each:.1f} tokens: inter-token latency is between pieces")
    if summary.offered_rate and summary.lag_s is not None and summary.lag_s.p99 > _LATE_S:
        cautions.append("requests were sent late: the generator could not keep the schedule")
    if summary.generator_cpu > _BUSY:
        cautions.append(
            f"the generator took {summary.generator_cpu:.0%} of a core: it may be the limit"
        )
    return cautions


def json_report(measurement: Measurement) -> bytes:
    """Everything: settings, summary and each request; times in seconds."""
    settings = msgspec.to_builtins(measurement.settings)
    if math.isinf(measurement.settings.request_rate or 0.0):
        settings["request_rate"] = "inf"  # JSON has no number for it
    report = {
        "spanwise_version": version("spanwise"),
        "settings": settings,
        "model": measurement.model,
        "vocab_size": measurement.vocab_size,
        "interrupted": measurement.run.interrupted,
        "summary": msgspec.to_builtins(measurement.summary),
        "requests": _requests(measurement),
    }
    return msgspec.json.format(msgspec.json.encode(report)) + b"\n"


def _requests(measurement: Measurement) -> list[dict[str, Any]]:
    arrivals_s = measurement.arrivals_s
    return [
        {
            "index": record.index,
            "scheduled_s": arrivals_s and arrivals_s[record.index],
            "sent_s": record.sent_s,
            "ttft_s": record.ttft_s if record.failure is None else None,
            "tpot_s": record.tpot_s if record.failure is None else None,
            "end_s": record.end_s,
            "input_tokens": record.input_tokens,
            "output_tokens": record.output_tokens,
            "error": record.failure and record.failure.kind,
            "retry_after": record.failure and record.failure.retry_after,
        }
        for record in measurement.run.records
    ]
