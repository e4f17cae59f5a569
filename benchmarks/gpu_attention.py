"""Decode attention on a card: keys and values read in place, gathered first, or by FlexAttention.

Bytes of keys and values a second, beside what the card reads at best. Every contender is compared
with the reference first. Work is repeated over pages that the card's cache cannot hold; a time is
that of a captured graph, so that the card alone counts, with a call from Python beside it. Written
without a card: no run of it exists yet.

    python benchmarks/gpu_attention.py --runs 5
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from machine import save, table_of
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from spanwise.device.attention import AttentionRule, attend_decodes, mask_of
from spanwise.device.paged_attention import paged_decode, reads_in_place

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
KV_HEADS, GROUP, DIM, PAGE = 8, 8, 128, 16
FLEX_PAGE = 128  # FlexAttention reads whole blocks of its own
BATCHES = (1, 8, 64, 256)
LENGTHS = (512, 2048, 8192)
TOKEN_BYTES = 2 * KV_HEADS * DIM * DTYPE.itemsize
BEYOND_CACHE_BYTES = 1 << 30
MOST_SETS = 32
RULE = AttentionRule(scaling=DIM**-0.5)
TOLERANCE = 2e-2

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """A batch of one length over the pages of one layer.

    ``slots`` ``[batch, length]`` in pages of PAGE, ``blocks`` ``[batch, n]`` of FLEX_PAGE tokens:
    other places of the same cache.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    counts: torch.Tensor
    blocks: torch.Tensor

    def of_blocks(self) -> Rows:
        """The same with the slots of the blocks."""
        slots = self.blocks[..., None] * FLEX_PAGE + torch.arange(FLEX_PAGE, device=DEVICE)
        parts = (self.query, self.keys, self.values, slots.flatten(1), self.counts, self.blocks)
        return Rows(*parts)


def main() -> None:
    """Measure every contender on every shape, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs: int = parser.parse_args().runs
    if not torch.cuda.is_available():
        raise SystemExit("gpu_attention needs a CUDA device and a build of torch for it")
    card = torch.cuda.get_device_name()
    best = max(read_bandwidth() for _ in range(runs))
    table = [["batch", "length", "contender", "GB/s", "of best", "us", "us from Python"]]
    found = []
    for length in LENGTHS:
        for batch in BATCHES:
            for name, graph_us, call_us, fault in measured(batch, length, runs):
                speed = batch * length * TOKEN_BYTES / graph_us / 1e3 if graph_us else 0.0
                cells = [f"{speed:,.0f}", f"{speed / best:.0%}"]
                cells += [f"{time_us:.1f}" for time_us in (graph_us, call_us)]
                table.append([str(batch), str(length), name, *([fault] * 4 if fault else cells)])
                figures = {"gb_per_s": speed, "graph_us": graph_us, "call_us": call_us}
                shape = {"batch": batch, "length": length}
                found.append(shape | {"name": name} | figures | {"fault": fault})
                print(table[-1], flush=True)
    head = f"{card}: reads {best:,.0f} GB/s at best."
    save(
        "gpu_attention",
        {"card": card, "read_gb_per_s": best, "runs": runs, "rows": found},
        f"{head}\n\n{table_of(table)}",
    )


def read_bandwidth() -> float:
    """GB/s of the sum over a filled buffer of 4 GiB, or a quarter of what is free."""
    size = min(4 << 30, torch.cuda.mem_get_info()[0] // 4)
    buffer = torch.ones(size // 4, device=DEVICE)
    return buffer.nbytes / graph_time([buffer.sum]) / 1e3


# -- contenders -----------------------------------------------------------------------------------


def in_place(rows: Rows) -> Step:
    """Our kernel."""
    assert reads_in_place(rows.query, rows.keys, rows.values, RULE), "the kernel does not work here"
    arguments = (rows.query, rows.keys, rows.values, rows.slots, rows.counts, RULE)
    return lambda: paged_decode(*arguments)


def gathered(rows: Rows) -> Step:
    """As a layer does without it."""
    mask = mask_of(rows.counts, rows.slots.shape[1], DTYPE)
    flat, shape = rows.slots.flatten(), (*rows.slots.shape, KV_HEADS, DIM)

    def step() -> torch.Tensor:
        keys, values = (part.index_select(0, flat).view(shape) for part in (rows.keys, rows.values))
        return attend_decodes(rows.query, keys, values, mask, RULE)

    return step


def flex(rows: Rows) -> Step:
    """Compiled, over whole blocks, of which all keys count."""
    batch, num_blocks = rows.blocks.shape
    # The index names physical blocks: every block of the cache has a column.
    columns = rows.keys.shape[0] // FLEX_PAGE
    index = torch.zeros(batch, 1, 1, columns, dtype=torch.int32, device=DEVICE)
    index[:, 0, 0, :num_blocks] = rows.blocks.int()
    none = torch.zeros(batch, 1, 1, dtype=torch.int32, device=DEVICE)
    mask = BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(index),
        none + num_blocks,
        index,
        BLOCK_SIZE=(FLEX_PAGE, FLEX_PAGE),
        seq_lengths=(1, rows.keys.shape[0]),
        compute_q_blocks=False,
    )
    query = rows.query.reshape(batch, KV_HEADS * GROUP, 1, DIM)
    keys, values = (part.transpose(0, 1)[None] for part in (rows.keys, rows.values))

    def step() -> torch.Tensor:
        out = compiled_flex(
            query, keys, values, block_mask=mask, scale=RULE.scaling, enable_gqa=True
        )
        return out.view(batch, KV_HEADS, GROUP, DIM)

    return step


compiled_flex = torch.compile(flex_attention, dynamic=False)
CONTENDERS = {"in place": in_place, "gather + SDPA": gathered, "FlexAttention": flex}


# -- measuring ------------------------------------------------------------------------------------


def measured(batch: int, length: int, runs: int) -> Iterator[tuple[str, float, float, str]]:
    """Of each contender: name, time of a step in a graph and from Python in us, what went wrong."""
    torch.cuda.empty_cache()
    torch.compiler.reset()  # after a few shapes it would compile no further one
    sets = list(drawn_sets(batch, length))
    steps, faults = {}, {}
    for name, contender in CONTENDERS.items():
        own = [rows.of_blocks() for rows in sets] if contender is flex else sets
        try:
            steps[name] = [contender(rows) for rows in own]
            difference = (steps[name][0]().float() - reference(own[0]).float()).abs().max().item()
            faults[name] = "" if difference < TOLERANCE else f"off by {difference:.1e}"
            graph_time(steps[name])  # some have no room for it
        # What another contender cannot do is a result; ours has to work.
        except (RuntimeError, ValueError) as error:
            if contender is in_place:
                raise
            faults[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    works = [name for name in CONTENDERS if not faults[name]]
    times: dict[str, tuple[list[float], list[float]]] = {}
    times |= {name: ([0.0], [0.0]) if faults[name] else ([], []) for name in CONTENDERS}
    for _ in range(runs):
        for name in works:
            times[name][0].append(graph_time(steps[name]))
            times[name][1].append(call_time(steps[name]))
    for name, (graph, call) in times.items():
        yield name, median(graph), median(call), faults[name]


def drawn_sets(batch: int, length: int) -> Iterator[Rows]:
    """Batches over one cache, together more than the card's own cache holds."""
    tokens = batch * length
    num_sets = max(2, min(MOST_SETS, BEYOND_CACHE_BYTES // (tokens * TOKEN_BYTES)))
    generator = torch.Generator(DEVICE).manual_seed(0)
    # Two sets of a large batch may read the same pages: it is past the card's cache by itself.
    num_slots = max(tokens, BEYOND_CACHE_BYTES // TOKEN_BYTES)
    shape = (num_slots, KV_HEADS, DIM)
    keys, values = (
        torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE) for _ in range(2)
    )
    counts = torch.full((batch,), length, device=DEVICE)
    for _ in range(num_sets):
        places = []
        for page in (PAGE, FLEX_PAGE):
            order = torch.randperm(num_slots // page, generator=generator, device=DEVICE)
            places.append(order[: tokens // page].view(batch, -1))
        slots = places[0][..., None] * PAGE + torch.arange(PAGE, device=DEVICE)
        query = torch.randn(batch, KV_HEADS, GROUP, DIM, generator=generator, device=DEVICE)
        yield Rows(query.to(DTYPE), keys, values, slots.flatten(1), counts, places[1])


def reference(rows: Rows) -> torch.Tensor:
    """In float32, one row after another."""
    parts = []
    for query, slots in zip(rows.query, rows.slots, strict=True):
        keys, values = rows.keys[slots][None].float(), rows.values[slots][None].float()
        mask = torch.zeros(1, slots.shape[0], device=DEVICE)
        parts.append(attend_decodes(query[None].float(), keys, values, mask, RULE))
    return torch.cat(parts)


def graph_time(steps: list[Step]) -> float:
    """Microseconds of a step on the card alone."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in steps[:2]:
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    return timed(graph.replay, 3) / len(steps)


def call_time(steps: list[Step]) -> float:
    """Microseconds of a step when Python calls it."""

    def all_of_them() -> None:
        for step in steps:
            step()

    all_of_them()
    return timed(all_of_them, 3) / len(steps)


def timed(work: Callable[[], object], times: int) -> float:
    """Microseconds of one of several in a row."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / times


if __name__ == "__main__":
    main()
