"""Single images that come by chance, computed one by one and in batches: throughput and latency.

One device of one core. Throughput: of thousands that have all come. Latency: of images that come
open-loop (Poisson), at the rate where computing them one by one saturates.
Ends with exit code 1 where batches give less than twice the throughput, or where the p99 is beyond
the set delay and the time of one full batch.

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
from spanwise.worker.supervisor import Supervisor

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


def saturated(model: Model, num_images: int) -> float:
    """Images a second where all have come at once."""
    image, begin_s = np.zeros((3, 8, 8), np.float32), time.perf_counter()
    wait([model.submit(image) for _ in range(num_images)])
    return num_images / (time.perf_counter() - begin_s)


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
    found: dict[str, float] = {}
    supervisor = Supervisor()  # so that the device has a process of its own
    for name, size, delay_ms in (("one by one", 1, 0.0), ("batches", BATCH_SIZE, DELAY_MS)):
        with Model(
            MODEL,
            devices="cpu:2",
            data_parallel_size=1,
            max_batch_size=size,
            max_delay_ms=delay_ms,
            supervisor=supervisor,
        ) as model:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the device has the other
            offer(model, 100, 1, seed)
            found[f"{name}/s"] = saturated(model, 1000 if size == 1 else 4000)
            if size > 1:
                _, taken_s = offer(model, found["one by one/s"], SECONDS, seed)
                found["p50_s"], found["p99_s"] = (quantiles(taken_s, n=100)[i] for i in (49, 98))
                found["bound_s"] = DELAY_MS / 1e3 + batch_s(model)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    supervisor.shutdown()
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
        ["p50 where one by one saturates, ms", "", f"{1e3 * own['p50_s']:.1f}"],
        ["p99 where one by one saturates, ms", "", f"{1e3 * own['p99_s']:.1f}"],
        ["delay + one full batch, ms", "", f"{1e3 * own['bound_s']:.1f}"],
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
