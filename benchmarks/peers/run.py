"""Spanwise beside what a user would pick instead: the same prompts and token counts in one run.

Makes a random Llama of 506 million parameters in bf16, loads every engine in a process of its own
on as many cores as its layout has devices, and asks them in turns (A B C A B C ...), each run with
new random prompts, the same for all. What counts is the ratio within a run; the table shows the
median over the runs, and the smallest and largest. Above 1: Spanwise is faster. Exits with code 1
where a limit is missed. Wants a machine of two cores that does nothing else.

    python benchmarks/peers/run.py
    python benchmarks/peers/run.py --peers spanwise,vllm --rows decode,serving --runs 7
    python benchmarks/peers/run.py --quick
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from child import Child, EngineSpec
from first_token import Starter, starters
from load_memory import MODEL, in_child, write_model
from machine import describe_machine, save, table_of
from measures import COMPARISONS, MEASURES, Comparison
from vllm_venv import vllm_python

ROWS = ("decode", "int8", "prefill", "serving", "layouts", "startup")
PEERS = ("spanwise", "transformers", "vllm")
MIN_RUNS, QUICK_RUNS = 5, 2
KV_CACHE_GIB = 1
# As tuned by hand; its own choice of 8,192 for two stages leaves one of them idle.
VLLM_PP_TOKENS = 1024
FIRST_TOKEN_LIMIT_S = 6.5
FIRST_TOKEN_GAIN = 8.0

# Seconds of every run, by who was asked what among which others.
Figures = dict[tuple[str, str, str], list[float]]


@dataclass(frozen=True)
class Bench:
    """What all parts need: the model, the engines, how often, and where logs go."""

    model: Path
    engines: dict[str, EngineSpec]
    num_runs: int
    logs: Path


def main() -> int:
    """Measure what is asked for and judge it."""
    chosen = _options()
    # These end it as an interrupt does: engines that are stopped would stay for ever.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    peers, rows = _words(chosen.peers, PEERS), _words(chosen.rows, ROWS)
    num_runs = QUICK_RUNS if chosen.quick else max(MIN_RUNS, chosen.runs)
    found: dict[str, Any] = {"engines": {}, "seconds": {}}
    with tempfile.TemporaryDirectory(prefix="spanwise-peers-") as scratch:
        python = vllm_python() if "vllm" in peers else None
        environment = _vllm_environment(Path(scratch))
        bench = Bench(
            Path(scratch, "model"), _engines(python, environment), num_runs, Path(scratch)
        )
        bench.model.mkdir()
        in_child(write_model, bench.model)
        wanted = [
            each
            for each in COMPARISONS
            if each.row in rows and each.theirs.split()[0] in (*peers, "spanwise", "hardware")
        ]
        lines = compare(bench, wanted, found)
        if "startup" in rows:
            lines += start_up(bench, starters(python, environment), found)
    versions = {
        name: text
        for engine in found["engines"].values()
        for name, text in engine["versions"].items()
    }
    found = {"machine": describe_machine() | versions, "runs": num_runs, "lines": lines} | found
    if chosen.quick:
        print(table(lines))
    else:
        is_whole = set(rows) == set(ROWS) and set(peers) == set(PEERS)
        save("peers" if is_whole else f"peers_{'_'.join(rows)}", found, table(lines))
    return 0 if all(line["holds"] is not False for line in lines) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="spanwise is always there")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--runs", type=int, default=MIN_RUNS, help=f"at least {MIN_RUNS}")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_RUNS} runs, and no result is kept"
    )
    return parser.parse_args()


def _words(given: str, known: Sequence[str]) -> list[str]:
    words = given.split(",")
    if unknown := sorted(set(words) - set(known)):
        raise SystemExit(f"{', '.join(unknown)}: not among {', '.join(known)}")
    return words


def _vllm_environment(scratch: Path) -> dict[str, str]:
    """What it compiles stays with this run; the first start of all pays for it, unmeasured."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CACHE_ROOT": str(scratch / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _engines(vllm: Path | None, environment: dict[str, str]) -> dict[str, EngineSpec]:
    """Every engine by its name in ``COMPARISONS``."""
    degrees = {
        "tp=2": {"tensor_parallel_size": 2},
        "pp=2": {"pipeline_parallel_size": 2},
        "dp=2": {"data_parallel_size": 2},
    }
    one_thread = {"OMP_NUM_THREADS": "1"}
    specs = {
        "spanwise": EngineSpec("engine_spanwise.py", options={"layout": {}}),
        "spanwise int8": EngineSpec(
            "engine_spanwise.py", options={"layout": {"quantization": "int8"}}
        ),
        "transformers": EngineSpec(
            "engine_transformers.py", options={"continuous": False}, environment=one_thread
        ),
        "transformers continuous": EngineSpec(
            "engine_transformers.py", options={"continuous": True}, environment=one_thread
        ),
        "hardware": EngineSpec("engine_hardware.py", environment=one_thread),
    }
    for layout, degree in degrees.items():
        specs[f"spanwise {layout}"] = EngineSpec("engine_spanwise.py", 2, {"layout": degree})
    if vllm is not None:
        one = environment | {"VLLM_CPU_OMP_THREADS_BIND": "0"}
        two = environment | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        stages = degrees["pp=2"] | {"max_num_batched_tokens": VLLM_PP_TOKENS}
        specs |= {
            "vllm": EngineSpec("engine_vllm.py", 1, {"layout": {}}, vllm, one),
            "vllm tp=2": EngineSpec("engine_vllm.py", 2, {"layout": degrees["tp=2"]}, vllm, two),
            "vllm pp=2": EngineSpec("engine_vllm.py", 2, {"layout": stages}, vllm, two),
        }
    return specs


# -- engines beside one another


def compare(
    bench: Bench, wanted: Sequence[Comparison], found: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure one group after the other, for memory holds one at a time; judge each comparison."""
    figures: Figures = defaultdict(list)
    for group in dict.fromkeys(each.group for each in wanted):
        measure_group(
            bench, group, [each for each in wanted if each.group == group], figures, found
        )
    for (group, engine, measure), seconds in figures.items():
        found["seconds"][f"{group}: {engine}: {measure}"] = seconds
    return [judge(each, figures) for each in wanted]


def measure_group(
    bench: Bench, group: str, wanted: Sequence[Comparison], figures: Figures, found: dict[str, Any]
) -> None:
    """Load a group's engines, and ask them in turns, row by row."""
    asked = {row: _asked(wanted, row) for row in ROWS}
    names = dict.fromkeys(engine for pairs in asked.values() for engine, _ in pairs)
    with ExitStack() as loaded:
        children = {name: loaded.enter_context(_start(bench, group, name)) for name in names}
        for row, pairs in asked.items():
            for engine, measure in pairs:
                children[engine].ask(MEASURES[measure].warm_up(f"warm {row} {measure}"))
            for run in range(bench.num_runs):
                for engine, measure in pairs:
                    how = MEASURES[measure]
                    seconds = how.figure(*children[engine].ask(how.jobs(f"{row} {measure} {run}")))
                    figures[group, engine, measure].append(seconds)
                    say(f"{group}, run {run + 1}: {engine}, {measure}: {how.shown(seconds)}")
        for name, child in children.items():
            found["engines"][f"{group}: {name}"] = {
                "versions": child.versions,
                "load_s": child.load_s,
                "memory_bytes": child.memory_bytes(),
            }


def _asked(wanted: Sequence[Comparison], row: str) -> list[tuple[str, str]]:
    """Whom to ask what in a row, each once; the engines of a measure follow one another."""
    pairs = dict.fromkeys(pair for each in wanted if each.row == row for pair in each.asked)
    measures = list(dict.fromkeys(measure for _, measure in pairs))
    return sorted(pairs, key=lambda pair: measures.index(pair[1]))


def _start(bench: Bench, group: str, name: str) -> Child:
    say(f"{group}: loading {name}")
    options = {"model": str(bench.model), "kv_cache_gib": KV_CACHE_GIB, "sizes": MODEL}
    return Child(name, bench.engines[name], options, bench.logs / f"{group} {name}.log")


def judge(comparison: Comparison, figures: Figures) -> dict[str, Any]:
    """Ratios within the runs, and their median against the limit."""
    (ours, measure), (theirs, theirs_by) = comparison.asked
    own = figures[comparison.group, ours, measure]
    other = figures[comparison.group, theirs, theirs_by]
    return _line(
        comparison.row,
        measure,
        (ours, MEASURES[measure].shown(median(own))),
        (_called(theirs, theirs_by, measure), MEASURES[theirs_by].shown(median(other))),
        [b / a for a, b in zip(own, other, strict=True)],
        comparison.at_least,
    )


def _called(engine: str, by: str, measure: str) -> str:
    if engine == "vllm pp=2":
        return f"{engine}, {VLLM_PP_TOKENS} tokens a step"
    return engine if by == measure else by.partition(",")[0]


def _line(
    row: str,
    what: str,
    ours: tuple[str, str],
    theirs: tuple[str, str],
    ratios: list[float],
    at_least: float | None,
) -> dict[str, Any]:
    return {
        "row": row,
        "what": what,
        "ours": " ".join(ours),
        "against": " ".join(theirs),
        "ratio": median(ratios),
        "ratios": ratios,
        "wanted": "" if at_least is None else f"{at_least:g}x",
        "holds": None if at_least is None else median(ratios) >= at_least,
    }


# -- from the start of a process


def start_up(
    bench: Bench, wanted: dict[str, Starter], found: dict[str, Any]
) -> list[dict[str, Any]]:
    """First tokens with warm and with cold files, in turns."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for name, starter in wanted.items():
        seconds[f"{name}, first of all"].append(_started(bench, name, starter, "first of all"))
    for _ in range(bench.num_runs):
        for name, starter in wanted.items():
            seconds[f"{name}, warm"].append(_started(bench, name, starter, "warm"))
    for _ in range(min(bench.num_runs, 3)):
        for name, starter in wanted.items():
            starter.forget_files(bench.model)
            seconds[f"{name}, cold"].append(_started(bench, name, starter, "cold"))
    found["first_token_s"] = seconds
    lines = [_limit_line(seconds["spanwise, warm"])]
    if "vllm" in wanted:
        lines += [_first_line(seconds, how) for how in ("warm", "cold")]
    return lines


def _started(bench: Bench, name: str, starter: Starter, how: str) -> float:
    seconds = starter.first_token_s(bench.model, bench.logs / f"start {name}.log")
    say(f"first token, {how}: {name}: {seconds:.2f} s")
    return seconds


def _limit_line(own: list[float]) -> dict[str, Any]:
    return {
        "row": "startup",
        "what": "first token, warm",
        "ours": f"spanwise {median(own):.2f} s",
        "against": "",
        "ratio": None,
        "wanted": f"<= {FIRST_TOKEN_LIMIT_S} s",
        "holds": median(own) <= FIRST_TOKEN_LIMIT_S,
    }


def _first_line(seconds: dict[str, list[float]], how: str) -> dict[str, Any]:
    own, other = seconds[f"spanwise, {how}"], seconds[f"vllm, {how}"]
    return _line(
        "startup",
        f"first token, {how}",
        ("spanwise", f"{median(own):.2f} s"),
        ("vllm", f"{median(other):.2f} s"),
        [b / a for a, b in zip(own, other, strict=True)],
        FIRST_TOKEN_GAIN if how == "warm" else None,
    )


def table(lines: Sequence[dict[str, Any]]) -> str:
    """One line a comparison."""
    cells = [["row", "what", "ours", "against", "ratio", "from - to", "wanted", "holds"]]
    for line in lines:
        ratios = line.get("ratios", [])
        cells.append(
            [
                line["row"],
                line["what"],
                line["ours"],
                line["against"],
                f"{line['ratio']:.2f}x" if ratios else "",
                f"{min(ratios):.2f} - {max(ratios):.2f}" if ratios else "",
                line["wanted"],
                {True: "yes", False: "NO", None: ""}[line["holds"]],
            ]
        )
    return table_of(cells) + (
        "\n\nRatios of speeds within a run (above 1: Spanwise is faster); median, smallest and "
        "largest. One core per device. The layouts' gain over the one device counts only where "
        "the serving rows against vLLM hold."
    )


def say(line: str) -> None:
    """Progress, kept off the output."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
