"""A ViT-B-shaped random model on one device and on two, one core each: replicas, and two stages.

Each run is a fresh process, layouts in turns; images are computed once before the time is taken.
Ends with exit code 1 where a median gain is below its limit.

    python benchmarks/forward_scaling.py --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from machine import save, table_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "one device": {},
    "dp=2": {"devices": "cpu:2", "data_parallel_size": 2},
    "pp=2": {"devices": "cpu:2", "pipeline_parallel_size": 2},
}
LIMITS = {"dp=2": 1.9, "pp=2": 1.7}
BATCH_SIZE, NUM_IMAGES = 8, 384


def write_model(folder: Path) -> None:
    """ViT-B: 86 million random parameters in bf16."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=1000)).to(torch.bfloat16).save_pretrained(folder)


def one_run(folder: str, layout: dict[str, Any]) -> float:
    """Images a second."""
    import numpy as np

    from spanwise import Model

    if not layout:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    chance = np.random.default_rng(0)
    images = [chance.standard_normal((3, 224, 224), np.float32) for _ in range(NUM_IMAGES)]
    with Model(folder, max_batch_size=BATCH_SIZE, **layout) as model:
        model.map(images[: 4 * BATCH_SIZE])
        begin_s = time.perf_counter()
        model.map(images)
        return NUM_IMAGES / (time.perf_counter() - begin_s)


def main() -> int:
    """Run all layouts in turns, judge the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "LAYOUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(one_run(options.one[0], json.loads(options.one[1])))
        return 0
    rates: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for _ in range(options.runs):
            for name, layout in LAYOUTS.items():
                command = [sys.executable, __file__, "--one", folder, json.dumps(layout)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rates[name].append(float(done.stdout))
    rows, holds = [["layout", "images/s", "gain", "asked", "holds"]], True
    for name, own in rates.items():
        gains = [rate / single for rate, single in zip(own, rates["one device"], strict=True)]
        limit = LIMITS.get(name)
        passed = limit is None or median(gains) >= limit
        holds &= passed
        rows.append(
            [
                name,
                f"{median(own):.1f} ({min(own):.1f}..{max(own):.1f})",
                f"{median(gains):.2f} ({min(gains):.2f}..{max(gains):.2f})",
                "" if limit is None else f"{limit:.1f}",
                "" if limit is None else ("yes" if passed else "NO"),
            ]
        )
    said = (
        f"\n\n{NUM_IMAGES} images of 3 x 224 x 224 in batches of {BATCH_SIZE}, bf16; medians "
        f"(lowest..highest) of {options.runs} runs in turns; gain: against one device in the turn."
    )
    save("forward_scaling", {"rates": rates}, table_of(rows) + said)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
