"""Collectives of two CPU ranks through shared memory, each a process with a core to itself.

Three tables: calls one after another, with gloo beside them; what a rank that comes late costs,
asleep or spinning; and two ways to combine the products of experts. Ends with exit code 1 where the
limit is missed. Meant for a machine that does nothing else.

    python benchmarks/collectives.py --runs 7
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from machine import save, table_of

from spanwise.comm.communicator import Communicator, Link
from spanwise.comm.counters import DEFAULT_SPIN_S
from spanwise.comm.process_group import GroupCommunicator, Operations
from spanwise.comm.segment import SegmentLayout, create_segment, interrupt
from spanwise.comm.shared_memory import open_rank_comm
from spanwise.model.experts import combine_by_owner, combine_on_every_rank

RANKS = 2
LIMIT_US = 15.0
LIMITED = "all_reduce 2.5 KB"
# Between two collectives of a decode step.
WORK_S = 300e-6
LATE_US = (0, 20, 50, 100, 200, 500, 2000)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
TOP_K, HIDDEN = 8, 2048

Body = Callable[[], object]
Stamps = list[tuple[float, float]]  # of each call: when this rank came, and when it went


@dataclass(frozen=True)
class Case:
    """What the ranks call, how often in a run, and by how much rank 1 comes later than rank 0."""

    name: str
    make: Callable[[Channels], Body]
    num_calls: int
    late_us: int | None = None


class Channels:
    """What one rank has to measure with."""

    def __init__(self, rank: int, segments: dict[str, int], store: str) -> None:
        self.rank = rank
        self.spinning: Communicator = open_rank_comm(segments["spinning"], 0, rank).tp
        self.sleeping: Communicator = open_rank_comm(segments["sleeping"], 0, rank, spin_s=0).tp
        links = open_rank_comm(segments["links"], rank, 0)
        there, back = links.outbox or links.inbox, links.tokens
        assert there is not None and back is not None  # both ranks are at a border
        self.there: Link = there
        self.back: Link = back
        limit = timedelta(seconds=300)
        backend = dist.ProcessGroupGloo(dist.FileStore(store, RANKS), rank, RANKS, limit)
        operations = Operations(backend, f"rank {rank}", threading.Event())
        self.gloo: Communicator = GroupCommunicator(operations, rank, RANKS)


def main() -> int:
    """Measure all cases in turns, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--calls", type=int, default=2000, help="calls in a run of a small case")
    chosen = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:RANKS]
    if len(cores) < RANKS:
        raise SystemExit(f"{RANKS} ranks need a core each; this process may use {len(cores)}")
    wanted = cases(chosen.calls)
    stamps = on_ranks(wanted, max(5, chosen.runs), cores)
    found = [summary(case, stamps, index) for index, case in enumerate(wanted)]
    limited = next(row for row in found if row["name"] == LIMITED)
    holds = bool(limited["median_us"] <= LIMIT_US)
    rows = {"rows": found, "limit": {"name": LIMITED, "us": LIMIT_US, "holds": holds}}
    save("collectives", rows, tables(found, holds))
    return 0 if holds else 1


def cases(num_calls: int) -> list[Case]:
    """All that is measured; large and slow ones are called less often."""
    few = max(1, num_calls // 4)
    sizes = {"2.5 KB": 1280, "20 KB": 10240, "40 KB": 20480, "2.6 MB": 1331200}
    found = []
    for label, entries in sizes.items():
        large = entries > 10**6
        found.append(Case(f"all_reduce {label}", reducing(entries), few if large else num_calls))
    for label in ("2.5 KB", "40 KB"):
        found.append(Case(f"all_gather {label}", gathering(sizes[label]), num_calls))
        found.append(Case(f"all_to_all {label}", exchanging(sizes[label]), num_calls))
    found.append(Case("barrier", lambda channels: channels.spinning.barrier, num_calls))
    found.append(Case("link there and back 2.5 KB", ping(1280), num_calls))
    found.append(Case("gloo all_reduce 2.5 KB", reducing(1280, "gloo"), few))
    for late_us in LATE_US:
        for how in ("spinning", "sleeping"):
            found.append(Case(f"late {how}", reducing(1280, how), few, late_us))
    for tokens in TOKENS:
        calls = max(50, num_calls // max(1, tokens // 4))
        for combine in (combine_on_every_rank, combine_by_owner):
            found.append(Case(f"{combine.__name__} {tokens}", combining(combine, tokens), calls))
    return found


# --- what a rank calls ----------------------------------------------------------------------------


def reducing(entries: int, how: str = "spinning") -> Callable[[Channels], Body]:
    """Sum a step's hidden states; they stay zero."""

    def make(channels: Channels) -> Body:
        comm, tensor = getattr(channels, how), torch.zeros(1, entries, dtype=torch.bfloat16)
        return lambda: comm.all_reduce(tensor)

    return make


def gathering(entries: int) -> Callable[[Channels], Body]:
    """Each gives as many."""

    def make(channels: Channels) -> Body:
        tensor = torch.zeros(1, entries, dtype=torch.bfloat16)
        return lambda: channels.spinning.all_gather(tensor, [entries] * RANKS)

    return make


def exchanging(entries: int) -> Callable[[Channels], Body]:
    """Each gives half of its rows to the other."""

    def make(channels: Channels) -> Body:
        tensor = torch.zeros(RANKS, entries // RANKS, dtype=torch.bfloat16)
        return lambda: channels.spinning.all_to_all(tensor, [[1] * RANKS] * RANKS)

    return make


def ping(entries: int) -> Callable[[Channels], Body]:
    """A tensor to the other rank, and one back."""

    def make(channels: Channels) -> Body:
        tensor = torch.zeros(1, entries, dtype=torch.bfloat16)
        there, back = channels.there, channels.back

        def first() -> None:
            there.send(tensor)
            back.recv(tensor)

        def last() -> None:
            there.recv(tensor)
            back.send(tensor)

        return last if channels.rank else first

    return make


def combining(combine: Callable[..., torch.Tensor], tokens: int) -> Callable[[Channels], Body]:
    """The products of a layer's experts, half of them of this rank, to mixed hidden states."""

    def make(channels: Channels) -> Body:
        products = torch.zeros(tokens, TOP_K, HIDDEN, dtype=torch.bfloat16)
        weights = torch.full((tokens, TOP_K), 1 / TOP_K, dtype=torch.bfloat16)
        return lambda: combine(channels.spinning, products, weights)

    return make


# --- the ranks ------------------------------------------------------------------------------------


def on_ranks(wanted: list[Case], num_runs: int, cores: list[int]) -> list[list[list[Stamps]]]:
    """Every case's stamps, by rank, run and case."""
    layouts = {
        "spinning": SegmentLayout(1, RANKS),
        "sleeping": SegmentLayout(1, RANKS),
        "links": SegmentLayout(RANKS, 1),
    }
    segments = {name: create_segment(name, layout) for name, layout in layouts.items()}
    with tempfile.TemporaryDirectory(prefix="spanwise-collectives-") as scratch:
        store, files = f"{scratch}/store", [Path(scratch) / str(rank) for rank in range(RANKS)]
        pids = []
        for rank, core in enumerate(cores):
            if pid := os.fork():
                pids.append(pid)
                continue
            code = 1
            try:
                os.sched_setaffinity(0, {core})
                torch.set_num_threads(1)
                measured = measure(Channels(rank, segments, store), wanted, num_runs)
                files[rank].write_text(json.dumps(measured))
                code = 0
            except BaseException:
                traceback.print_exc()
                for segment in segments.values():
                    interrupt(segment)  # the other rank must not wait for this one
            finally:
                os._exit(code)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(statuses):
            raise SystemExit("a rank failed")
        return [json.loads(file.read_text()) for file in files]


@torch.inference_mode()
def measure(channels: Channels, wanted: list[Case], num_runs: int) -> list[list[Stamps]]:
    """Every run goes once through all cases."""
    bodies = [(case, case.make(channels)) for case in wanted]
    for case, body in bodies:  # what is made once: connections, views, pages
        one_run(channels, case, body, 20)
    return [
        [one_run(channels, case, body, case.num_calls) for case, body in bodies]
        for _ in range(num_runs)
    ]


def one_run(channels: Channels, case: Case, body: Body, num_calls: int) -> Stamps:
    """Call after call; before each one that someone is late for, both compute for a while."""
    late_s = (case.late_us or 0) * 1e-6 * channels.rank
    stamps = []
    channels.spinning.barrier()
    for _ in range(num_calls):
        came = perf_counter()
        if case.late_us is not None:
            until = came + WORK_S + late_s
            while (came := perf_counter()) < until:
                pass
        body()
        stamps.append((came, perf_counter()))
    return stamps


# --- the result -----------------------------------------------------------------------------------


def summary(case: Case, stamps: list[list[list[Stamps]]], index: int) -> dict[str, Any]:
    """Microseconds of a call, or from the last rank's coming to the last one's going if late."""
    medians, means = [], []
    for runs in zip(*stamps, strict=True):
        by_rank = [run[index] for run in runs]
        if case.late_us is None:
            taken = [went - came for came, went in by_rank[0]]
        else:
            taken = [
                max(went for _, went in call) - max(came for came, _ in call)
                for call in zip(*by_rank, strict=True)
            ]
        medians.append(1e6 * median(taken))
        means.append(1e6 * fmean(taken))
    return {
        "name": case.name,
        "late_us": case.late_us,
        "num_calls": case.num_calls,
        "median_us": median(medians),
        "fastest_us": min(medians),
        "slowest_us": max(medians),
        "mean_us": median(means),
        "runs": medians,
    }


def tables(found: list[dict[str, Any]], holds: bool) -> str:
    """Three tables for a reader."""
    by_name = {(row["name"], row["late_us"]): row for row in found}
    plain = [row for row in found if row["late_us"] is None and "combine" not in row["name"]]
    numbers = ("median_us", "fastest_us", "slowest_us", "mean_us")
    calls = [["call", "median us", "fastest run", "slowest run", "mean us"]]
    calls += [[row["name"], *(f"{row[key]:.1f}" for key in numbers)] for row in plain]
    late = [["rank 1 late by us", "spins us", "mean", "sleeps us", "mean"]]
    for late_us in LATE_US:
        cells = [by_name[f"late {how}", late_us] for how in ("spinning", "sleeping")]
        figures = [f"{cell[key]:.1f}" for cell in cells for key in ("median_us", "mean_us")]
        late.append([str(late_us), *figures])
    combined = [["tokens", "MB of products", "on every rank us", "by owner us", "ratio"]]
    for tokens in TOKENS:
        ways = (combine_on_every_rank, combine_by_owner)
        every, owner = (by_name[f"{way.__name__} {tokens}", None]["median_us"] for way in ways)
        megabytes = tokens * TOP_K * HIDDEN * 2 / 1e6
        figures = [f"{megabytes:.2f}", f"{every:.0f}", f"{owner:.0f}", f"{every / owner:.2f}"]
        combined.append([str(tokens), *figures])
    return (
        f"{table_of(calls)}\n\n{LIMITED}: at most {LIMIT_US:g} us, "
        f"{'holds' if holds else 'MISSED'}. Medians of the runs' medians; bf16.\n\n"
        f"{table_of(late)}\n\nAn all_reduce of 2.5 KB after {WORK_S * 1e6:.0f} us of work: from "
        f"the last rank's coming to the last one's going. Spins: at most {DEFAULT_SPIN_S * 1e6:g} "
        f"us.\n\n{table_of(combined)}\n\nThe products of {TOP_K} experts a token, hidden size "
        f"{HIDDEN}, summed: by every rank, or by each token's owner, which hands the sums on."
    )


if __name__ == "__main__":
    sys.exit(main())
