"""Two devices of one core each, of which one is slowed to half: are both kept busy?

The slow one's process is stopped for half of the time, 5 ms at a time. Together they should give
95% of the sum of what each gives alone; beside it, what half of the items for each would give. Ends
with exit code 1 where they do not.

    python benchmarks/unequal_devices.py --runs 5
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from machine import save, table_of

from spanwise import Model
from spanwise.worker.local import LocalProcessExecutor
from spanwise.worker.supervisor import Supervisor

NUM_ITEMS, BATCH_SIZE, LIMIT = 240, 4, 0.95
_HALF_S = 0.005


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """A process that runs half of the time."""
    done = threading.Event()

    def stop_and_go() -> None:
        while not done.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(_HALF_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(_HALF_S)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def closing_after(supervisor: Supervisor) -> Iterator[None]:
    """End a supervisor when the block ends."""
    try:
        yield
    finally:
        supervisor.shutdown()


def write_model(folder: Path) -> None:
    """A small random ViT, some milliseconds an image."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=112,
    )
    ViTForImageClassification(config).save_pretrained(folder)


def rate(folder: str, replicas: int, slow_one: bool) -> float:
    """Images a second; of several replicas the last one is the slow one."""
    chance = np.random.default_rng(0)
    images = [chance.standard_normal((3, 112, 112), np.float32) for _ in range(64)]
    supervisor = Supervisor()  # so that one device alone has a process of its own too
    with (
        closing_after(supervisor),
        Model(
            folder,
            devices="cpu:2",
            data_parallel_size=replicas,
            max_batch_size=BATCH_SIZE,
            supervisor=supervisor,
        ) as model,
    ):
        model.map(images)
        executor = model._loop._core.replicas[-1].executor
        assert isinstance(executor, LocalProcessExecutor)
        pid = executor._replica.workers[0].pid  # type: ignore[attr-defined]
        with slowed(pid) if slow_one else nullcontext():
            begin_s = time.perf_counter()
            model.map([images[i % len(images)] for i in range(NUM_ITEMS)])
            return NUM_ITEMS / (time.perf_counter() - begin_s)


def main() -> int:
    """Each alone and both together, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for _ in range(options.runs):
            fast, slow = rate(folder, 1, False), rate(folder, 1, True)
            both = rate(folder, 2, True)
            runs.append({"fast": fast, "slow": slow, "both": both})
    share = median(run["both"] / (run["fast"] + run["slow"]) for run in runs)
    split = median(2 * run["slow"] / (run["fast"] + run["slow"]) for run in runs)
    rows = [["devices", "images/s, median", "of the sum"]]
    for name in ("fast", "slow", "both"):
        own = median(run[name] for run in runs)
        rows.append([name, f"{own:.1f}", f"{100 * share:.0f}%" if name == "both" else ""])
    rows.append(["half for each (computed)", "", f"{100 * split:.0f}%"])
    verdict = "holds" if share >= LIMIT else "MISSED"
    said = f"\n\nMedians of {options.runs} runs in turns; asked {100 * LIMIT:.0f}%: {verdict}."
    save("unequal_devices", {"runs": runs}, table_of(rows) + said)
    return 0 if share >= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
