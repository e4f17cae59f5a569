"""Ten times what a server can do, for a minute: who is taken is served as ever, who is not is told.

Measures how many requests a second the server ends while 64 are always in flight, then, for as
long, requests that arrive at random times at that rate, then ten times as many. Those taken
must see their first token within twice the time they saw it at capacity, at the median and at the
99th percentile; the others must be told 429 or 503, with Retry-After, 99 of 100 within 50 ms;
nothing else may go wrong, and the server must say the same as before and hold nothing.

    python benchmarks/overload.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from machine import save, table_of
from one_core import PROGRAM, serving

from spanwise.bench.summary import distribution

MODEL = "spanwise/tiny-dense"
NUM_SEATS, TIMES = 64, 10
LIMIT, REFUSED_WITHIN_S = 2.0, 0.05
REFUSALS = ("http 429", "http 503")
LENGTHS = ("--input-len", "16:48", "--output-len", "16:48")
CANARIES = ("def main(", "import os", "class ")


def measure(url: str, folder: Path, *load: str) -> dict[str, Any]:
    """What ``spanwise bench serve`` finds; in a process of its own, which is light."""
    found = folder / "bench.json"
    command = [*PROGRAM, "bench", "serve", "--base-url", url, *LENGTHS, *load, "--quiet"]
    subprocess.run([*command, "--json", str(found)], check=True, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads(found.read_text())
    return report


def offered(url: str, folder: Path, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Requests at random times, ``rate`` a second: how each that came ended."""
    number = max(1, round(rate * seconds))
    report = measure(
        url, folder, "--request-rate", f"{rate:.3f}", "--num-requests", f"{number}",
        "--seed", f"{seed}",
    )  # fmt: skip
    requests = report["requests"]
    taken = [each for each in requests if each["error"] is None]
    refused = [each for each in requests if each["error"] in REFUSALS]
    return {
        "offered_per_s": rate,
        "num_offered": number,
        "num_taken": len(taken),
        "num_refused": len(refused),
        "others": Counter(
            each["error"] for each in requests if each["error"] not in (None, *REFUSALS)
        ),
        "num_without_retry_after": sum(each["retry_after"] is None for each in refused),
        "retry_after": Counter(each["retry_after"] for each in refused),
        "first_token_s": times([each["ttft_s"] for each in taken]),
        "refused_s": times([each["end_s"] - each["sent_s"] for each in refused]),
        "num_refused_late": sum(
            each["end_s"] - each["sent_s"] >= REFUSED_WITHIN_S for each in refused
        ),
        "generator_cpu": report["summary"]["generator_cpu"],
        "sent_late_s": report["summary"]["lag_s"]["p99"],
    }


def times(values: list[float]) -> dict[str, float] | None:
    """Percentiles; None of nothing."""
    found = distribution(values)
    if found is None:
        return None
    return {name: getattr(found, name) for name in ("p50", "p90", "p99", "max")}


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> str:
    """One plain request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def canaries(url: str) -> list[str]:
    """What fixed prompts are answered."""
    return [
        json.loads(
            ask(url, "/v1/completions", {
                "model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0,
            })
        )["choices"][0]["text"]
        for prompt in CANARIES
    ]  # fmt: skip


def becomes_idle(url: str) -> bool:
    """Whether nothing runs, waits or holds a block, a few seconds later at most."""
    for _ in range(50):
        lines = ask(url, "/metrics").splitlines()
        held = [
            line for line in lines if line.startswith(("spanwise:num_requests_", "spanwise:kv"))
        ]
        if all(float(line.split()[-1]) == 0 for line in held):
            return True
        time.sleep(0.1)
    return False


def run(seconds: float, arguments: list[str]) -> dict[str, Any]:
    """One server, at capacity and far beyond."""
    flags = ["--max-num-seqs", f"{NUM_SEATS}", "--dtype", "float32", *arguments]
    with tempfile.TemporaryDirectory() as name, serving(MODEL, *flags) as url:
        folder, expected = Path(name), canaries(url)
        # As many as keep all seats taken for about as long as the other runs take.
        pace = ["--concurrency", f"{NUM_SEATS}", "--num-requests"]
        trial = measure(url, folder, *pace, f"{4 * NUM_SEATS}")["summary"]["request_throughput"]
        number = f"{max(4 * NUM_SEATS, round(trial * seconds))}"
        capacity = measure(url, folder, *pace, number)["summary"]["request_throughput"]
        at = offered(url, folder, capacity, seconds, seed=1)
        over = offered(url, folder, TIMES * capacity, seconds, seed=2)
        return {
            "seconds": seconds,
            "capacity_per_s": capacity,
            "at_capacity": at,
            "overload": over,
            "same_text": canaries(url) == expected,
            "healthy": bool(ask(url, "/health")),
            "idle": becomes_idle(url),
        }


def judge(found: dict[str, Any]) -> dict[str, bool]:
    """Every promise, and whether it was kept."""
    at, over = found["at_capacity"], found["overload"]
    ratios = found["ratios"]
    return {
        f"first tokens within {LIMIT:g}x": max(ratios["p50"], ratios["p99"]) <= LIMIT,
        f"refused within {1000 * REFUSED_WITHIN_S:g} ms": over["refused_s"] is not None
        and over["refused_s"]["p99"] < REFUSED_WITHIN_S,
        "each told when to come again": not over["num_without_retry_after"],
        "nothing else fails": not at["others"] and not over["others"],
        "the server is as before": found["same_text"] and found["healthy"] and found["idle"],
    }


def main() -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("serve", nargs="*", help="more flags of spanwise serve, after --")
    options = parser.parse_args()
    found = run(options.seconds, options.serve)
    at, over = found["at_capacity"], found["overload"]
    found["ratios"] = {
        name: over["first_token_s"][name] / at["first_token_s"][name]
        for name in ("p50", "p90", "p99")
    }
    kept = judge(found)
    save("overload", {"kept": kept} | found, page(found, kept))
    return 0 if all(kept.values()) else 1


def page(found: dict[str, Any], kept: dict[str, bool]) -> str:
    """The table, and what it says."""
    at, over = found["at_capacity"], found["overload"]
    header = ["offered a second", "taken", "refused", "failed", "first token ms p50", "p90", "p99"]
    header += ["refused in ms p50", "p99", "max"]
    rows = [header]
    for each in (at, over):
        counts = [each["num_taken"], each["num_refused"], sum(each["others"].values())]
        cells = [f"{each['offered_per_s']:.0f}", *map(str, counts)]
        cells += milliseconds(each["first_token_s"], ("p50", "p90", "p99"))
        cells += milliseconds(each["refused_s"], ("p50", "p99", "max"))
        rows.append(cells)
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found["ratios"].items())
    said = (
        f"\n\nCapacity with {NUM_SEATS} requests always in flight: {found['capacity_per_s']:.1f} "
        f"requests a second. As many at random times, then {TIMES}x as many, for "
        f"{found['seconds']:g} s each. First tokens of those taken: {ratios} of those at capacity. "
        f"{over['num_refused_late']} of {over['num_refused']} were refused later than "
        f"{1000 * REFUSED_WITHIN_S:g} ms. "
        + "; ".join(f"{name}: {'holds' if held else 'MISSED'}" for name, held in kept.items())
        + "."
    )
    return table_of(rows) + said


def milliseconds(found: dict[str, float] | None, names: tuple[str, ...]) -> list[str]:
    """Cells of a table."""
    return [f"{1000 * found[name]:.0f}" if found else "-" for name in names]


if __name__ == "__main__":
    sys.exit(main())
