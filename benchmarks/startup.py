"""From the start of the process to the first text, for a model that comes with the package.

Each run is a fresh process; the files are in the page cache. Ends with exit code 1 where a limit is
missed. Meant for a machine that does nothing else: the load average is kept with the result, and
the CPU time of all processes together, which says more where the machine is busy.

    python benchmarks/startup.py --runs 7
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

from machine import save, table_of

MODEL, PROMPT = "spanwise/tiny-dense", "def main("
FIRST_TEXT_LIMIT_S = 6.0
HELP_LIMIT_S = 0.5

SCRIPT = """
import sys
from spanwise import LLM, SamplingParams
params = SamplingParams(max_tokens=16, temperature=0.0)
with LLM(sys.argv[1], devices="cpu:2", **{sys.argv[3]: 2}) as llm:
    for output in llm.stream(sys.argv[2], params):
        print(output.outputs[0].text, flush=True)
"""


def commands() -> dict[str, list[str]]:
    """What is started, by the name it has in the result."""
    program = [sys.executable, "-m", "spanwise"]
    run = [*program, "run", MODEL, PROMPT, "--devices", "cpu:2", "--max-tokens", "16"]
    script = [sys.executable, "-c", SCRIPT, MODEL, PROMPT]
    return {
        "spanwise run, tp=2": [*run, "--tensor-parallel-size", "2"],
        "spanwise run, dp=2": [*run, "--data-parallel-size", "2"],
        "script, tp=2": [*script, "tensor_parallel_size"],
        "script, dp=2": [*script, "data_parallel_size"],
        "spanwise --help": [*program, "--help"],
    }


def main() -> int:
    """Run everything in turns, and judge the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    num_runs = max(5, parser.parse_args().runs)
    wanted = commands()
    for command in wanted.values():
        first_text(command)  # files into the page cache
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in wanted}
    for _ in range(num_runs):
        for name, command in wanted.items():
            measured[name].append(first_text(command) | {"load": os.getloadavg()[0]})
    rows = [summary(name, runs) for name, runs in measured.items()]
    torch_free = not imports_torch(wanted["spanwise --help"])
    found = {"rows": rows, "help_imports_no_torch": torch_free, "runs": measured}
    save("startup", found, table(rows, num_runs, torch_free))
    return 0 if torch_free and all(row["holds"] for row in rows) else 1


def first_text(command: list[str]) -> dict[str, float]:
    """Seconds to the first byte on standard output, and CPU seconds of everything to the end."""
    with tempfile.TemporaryFile() as complaints:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints)
        assert process.stdout is not None
        with process.stdout:
            came = process.stdout.read(1)
            first_s = time.perf_counter() - started
            process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        complaints.seek(0)
        if not came or process.returncode:
            raise SystemExit(f"{command[1:]} failed: {complaints.read().decode()}")
    return {"first_text_s": first_s, "cpu_s": used.ru_utime + used.ru_stime}


def summary(name: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """The median and what it is held against."""
    times = [run["first_text_s"] for run in runs]
    limit_s = HELP_LIMIT_S if "--help" in name else FIRST_TEXT_LIMIT_S
    return {
        "name": name,
        "median_s": median(times),
        "fastest_s": min(times),
        "slowest_s": max(times),
        "median_cpu_s": median(run["cpu_s"] for run in runs),
        "limit_s": limit_s,
        "holds": median(times) <= limit_s,
    }


def imports_torch(command: list[str]) -> bool:
    """Whether a Python command imports torch."""
    python, *rest = command
    told = subprocess.run([python, "-X", "importtime", *rest], capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert "spanwise" in imported
    return "torch" in imported


def table(rows: list[dict[str, Any]], num_runs: int, torch_free: bool) -> str:
    """Seconds."""
    header = ["start", "median s", "fastest", "slowest", "CPU s", "limit", "holds"]
    numbers = ("median_s", "fastest_s", "slowest_s", "median_cpu_s", "limit_s")
    cells = [
        [row["name"], *(f"{row[key]:.2f}" for key in numbers), "yes" if row["holds"] else "NO"]
        for row in rows
    ]
    return table_of([header, *cells]) + (
        f"\n\n{num_runs} runs each, in turns. `spanwise --help` imports "
        f"{'no torch' if torch_free else 'TORCH'}. CPU s: all processes together, to their end."
    )


if __name__ == "__main__":
    sys.exit(main())
