"""Static, dynamic and continuous batching: one engine each, the same requests at the same times.

Requests arrive as a Poisson process, faster than they can be served, with output lengths spread
evenly over 8 to 256 tokens. Throughput counts output tokens from the first arrival to the last
token. Ends with exit code 1 where continuous batching is below twice the throughput of static.

    python benchmarks/batching.py --requests 96
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from statistics import mean, median
from typing import Any

from machine import save, table_of

from spanwise.engine.async_engine import AsyncEngine
from spanwise.engine.config import EngineConfig
from spanwise.types.sampling import SamplingParams
from spanwise.types.serving import EngineRequest

MODEL = "spanwise/tiny-dense"
MODES = ("static", "dynamic", "continuous")
BATCH_SIZE = 16
LIMIT = 2.0


def workload(num_requests: int, rate: float) -> list[tuple[float, list[int], int]]:
    """When each request comes, its prompt, and how many tokens it wants."""
    chance = random.Random(11)
    now_s, wanted = 0.0, []
    for _ in range(num_requests):
        now_s += chance.expovariate(rate)
        prompt = [chance.randrange(5, 4000) for _ in range(chance.randrange(8, 64))]
        wanted.append((now_s, prompt, chance.randrange(8, 257)))
    return wanted


async def run(mode: str, wanted: list[tuple[float, list[int], int]]) -> dict[str, Any]:
    """Serve the workload in one mode."""
    config = EngineConfig(
        model=MODEL,
        devices="cpu:1",
        max_num_seqs=BATCH_SIZE,
        batching=mode,
        batch_size=None if mode == "continuous" else BATCH_SIZE,
        batch_window_s=0.2,
        prefix_caching=False,
    )
    async with await AsyncEngine.start(config) as engine:
        warm = SamplingParams(max_tokens=4, ignore_eos=True)
        async for _ in engine.generate({"prompt_token_ids": [5, 6, 7]}, warm):
            continue
        begin_s = time.perf_counter()

        async def one(at_s: float, prompt: list[int], num_tokens: int) -> tuple[float, float, int]:
            await asyncio.sleep(max(0.0, begin_s + at_s - time.perf_counter()))
            came_s = time.perf_counter()
            params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
            request = EngineRequest(prompt={"prompt_token_ids": prompt}, params=params)
            first_s, count = 0.0, 0
            async for news in await engine.open(request):
                tokens = sum(len(delta.token_ids) for delta in news.deltas)
                if tokens and not count:
                    first_s = time.perf_counter() - came_s
                count += tokens
            assert count == num_tokens, f"{count} of {num_tokens} tokens came"
            return first_s, time.perf_counter() - came_s, count

        answers = await asyncio.gather(*[one(*each) for each in wanted])
        elapsed_s = time.perf_counter() - begin_s
    return {
        "mode": mode,
        "tokens_per_s": sum(count for _, _, count in answers) / elapsed_s,
        "elapsed_s": elapsed_s,
        "median_first_token_s": median(first for first, _, _ in answers),
        "mean_latency_s": mean(total for _, total, _ in answers),
    }


def main() -> int:
    """Run the modes in turns and judge the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rate", type=float, default=50.0, help="requests per second")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    wanted = workload(options.requests, options.rate)
    runs = [asyncio.run(run(mode, wanted)) for _ in range(options.runs) for mode in MODES]
    rows = []
    for mode in MODES:
        own = [each for each in runs if each["mode"] == mode]
        rows.append({"mode": mode} | {k: median(r[k] for r in own) for k in own[0] if k != "mode"})
    base = rows[0]["tokens_per_s"]
    cells = [
        [
            row["mode"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['tokens_per_s'] / base:.2f}x",
            f"{row['median_first_token_s']:.2f}",
            f"{row['mean_latency_s']:.2f}",
        ]
        for row in rows
    ]
    gain = rows[-1]["tokens_per_s"] / base
    header = ["batching", "tokens/s", "of static", "median first token s", "mean latency s"]
    said = (
        f"\n\n{options.requests} requests at {options.rate:g}/s, {BATCH_SIZE} at once, "
        f"8 to 256 tokens each; medians of {options.runs} runs in turns. Asked: continuous at "
        f"least {LIMIT:g}x static; {'holds' if gain >= LIMIT else 'MISSED'}."
    )
    save("batching", {"rows": rows, "runs": runs}, table_of([header, *cells]) + said)
    return 0 if gain >= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
