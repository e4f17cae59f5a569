"""What the server costs: tokens per second of 64 streams, against LLM.generate on the same work.

One device of one core for both; the server's other processes and the client share what is left of
the machine, as they would at home. The two run in turns, and each run of one is compared with the
runs of the other just before and after it, so that a machine whose speed changes does not decide.
Ends with exit code 1 where the median of those shares is below 85%.

    python benchmarks/serve_overhead.py
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from machine import save, table_of
from one_core import PROGRAM, on_one_core, serving

from spanwise import LLM, SamplingParams

MODEL = "spanwise/tiny-dense"
NUM_STREAMS, NUM_TOKENS = 64, 128
LIMIT = 0.85
ENGINE = {
    "devices": "cpu",
    "max_num_seqs": NUM_STREAMS,
    "max_step_tokens": 512,  # the same steps for both
    "dtype": "float32",
}


def prompts() -> list[list[int]]:
    """Token ids of different lengths."""
    chance = random.Random(5)
    return [
        [chance.randrange(5, 4000) for _ in range(chance.randrange(8, 40))]
        for _ in range(NUM_STREAMS)
    ]


def offline(wanted: list[list[int]]) -> float:
    """Tokens per second of LLM.generate."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with on_one_core(), LLM(MODEL, **ENGINE) as llm:
        llm.generate([{"prompt_token_ids": prompt} for prompt in wanted[:4]], params)
        begin_s = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in wanted], params)
        elapsed_s = time.perf_counter() - begin_s
    return sum(len(output.outputs[0].token_ids) for output in outputs) / elapsed_s


def served(wanted: list[list[int]], folder: Path) -> float:
    """Tokens per second of as many streams of a server, as its client counts them."""
    lines = folder / "prompts.jsonl"
    lines.write_text(
        "".join(
            json.dumps(
                {
                    "prompt_token_ids": prompt,
                    "max_tokens": NUM_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                }
            )
            + "\n"
            for prompt in wanted
        )
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    found = folder / "bench.json"
    with serving(MODEL, *flags) as url:
        subprocess.run(
            [
                *(*PROGRAM, "bench", "serve", "--base-url", url, "--prompts", str(lines)),
                *("--concurrency", str(NUM_STREAMS), "--num-requests", str(NUM_STREAMS)),
                *("--warmup", "4", "--json", str(found), "--quiet"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    report: dict[str, Any] = json.loads(found.read_text())
    return float(report["summary"]["output_throughput"])


def shares_of(offline_rates: list[float], served_rates: list[float]) -> list[float]:
    """The server's share in every pair of runs that follow on each other."""
    after = zip(served_rates, offline_rates, strict=True)
    before = zip(served_rates, offline_rates[1:], strict=False)
    return [served / offline for served, offline in (*after, *before)]


def main() -> int:
    """Run both in turns and judge the median share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    wanted = prompts()
    rates: dict[str, list[float]] = {"LLM.generate": [], "64 streams": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs):
            rates["LLM.generate"].append(offline(wanted))
            rates["64 streams"].append(served(wanted, Path(folder)))
    shares = shares_of(*rates.values())
    share = median(shares)
    cells = [
        [name, f"{median(values):.0f}", f"{min(values):.0f}", f"{max(values):.0f}"]
        for name, values in rates.items()
    ]
    said = (
        f"\n\n{NUM_STREAMS} requests of {NUM_TOKENS} tokens, {options.runs} runs of each in turns. "
        f"The server gives {share:.0%}, the median of {len(shares)} pairs of adjacent runs "
        f"({min(shares):.0%} to {max(shares):.0%}); asked {LIMIT:.0%}: "
        f"{'holds' if share >= LIMIT else 'MISSED'}."
    )
    table = table_of([["way", "tokens/s, median", "lowest", "highest"], *cells]) + said
    save("serve_overhead", {"share": share, "shares": shares, "runs": rates}, table)
    return 0 if share >= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
