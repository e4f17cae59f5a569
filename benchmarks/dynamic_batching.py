"""Single images that come by chance, computed one by one and in batches: throughput and latency.

One device of one core; images come open-loop (Poisson). Throughput: of what is offered far above
what the device can do. Latency: at 80% of that with batches, beyond what one by one can do.
Ends with exit code 1 where batches give less than twice the throughput, or where the p99 is beyond
the set delay and the time of one full batch after the one that an image finds at work.

    python benchmarks/dynamic_batching.py --runs 5
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from concurrent.futures import Future, wait
from statistics import median, quantiles
from typing import Any

import numpy as np
from machine import save, table_of

from spanwise import Model

MODEL = "spanwise/digits-image"
BATCH_SIZE, DELAY_MS, SECONDS = 16, 5.0, 8.0
LIMIT = 2.0


def offer(model: Model, rate: float, seconds: float, seed: int) -> tuple[float, list[float]]:
    """Images a second that were answered, and each one's seconds from its arrival."""
    chance, image = random.Random(seed), np.zeros((3, 8, 8), np.float32)
    taken_s: list[float] = []
    futures: list[Future[Any]] = []
    begin_s = due_s = time.perf_counter()
    while due_s < begin_s + seconds:
        due_s += chance.expovariate(rate)
        time.sleep(max(0.0, due_s - time.perf_counter()))
        future = model.submit(image)
        future.add_done_callback(
            lambda _, at_s=due_s: taken_s.append(time.perf_counter() - at_s)  # type: ignore[misc]
        )
        futures.append(future)
    wait(futures)
    return len(futures) / (time.perf_counter() - begin_s), taken_s


def batch_s(model: Model) -> float:
    """What a full batch takes, from the first image given to the last result."""
    image, times = np.zeros((3, 8, 8), np.float32), []
    for _ in range(50):
        begin_s = time.perf_counter()
        wait([model.submit(image) for _ in range(BATCH_SIZE)])
        times.append(time.perf_counter() - begin_s)
    return median(times)


def run(seed: int) -> dict[str, float]:
    """Both ways, each with a model of its own."""
    found = {}
    for name, size, delay_ms in (("one by one", 1, 0.0), ("batches", BATCH_SIZE, DELAY_MS)):
        with Model(
            MODEL,
            devices="cpu:2",
            data_parallel_size=1,
            max_batch_size=size,
            max_delay_ms=delay_ms,
        ) as model:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the device has the other
            offer(model, 500, 1, seed)
            found[f"{name}/s"], _ = offer(model, 20_000, 3, seed)
            if size > 1:
                rate = 0.8 * found["batches/s"]
                _, taken_s = offer(model, rate, SECONDS, seed)
                found["p50_s"], found["p99_s"] = (quantiles(taken_s, n=100)[i] for i in (49, 98))
                found["bound_s"] = DELAY_MS / 1e3 + 2 * batch_s(model)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    return found


def main() -> int:
    """Judge the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    runs = [run(seed) for seed in range(options.runs)]
    own = {key: median(each[key] for each in runs) for key in runs[0]}
    gain = median(each["batches/s"] / each["one by one/s"] for each in runs)
    late = median(each["p99_s"] / each["bound_s"] for each in runs)
    rows = [
        ["", "one by one", "batches"],
        ["images/s", f"{own['one by one/s']:.0f}", f"{own['batches/s']:.0f}"],
        ["p50 at 80% of that, ms", "", f"{1e3 * own['p50_s']:.1f}"],
        ["p99 at 80% of that, ms", "", f"{1e3 * own['p99_s']:.1f}"],
        ["delay + two batches, ms", "", f"{1e3 * own['bound_s']:.1f}"],
    ]
    holds = gain >= LIMIT and late <= 1.0
    said = (
        f"\n\n{MODEL}, batches of up to {BATCH_SIZE}, delay {DELAY_MS:g} ms; medians of "
        f"{options.runs} runs; {gain:.1f}x the throughput, asked {LIMIT:g}x; p99 {late:.2f} of the "
        f"bound: {'holds' if holds else 'MISSED'}."
    )
    save("dynamic_batching", {"runs": runs}, table_of(rows) + said)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
