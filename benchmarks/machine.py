"""Where a number was measured: no number stands without it."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def describe_machine() -> dict[str, Any]:
    """Processor, memory, versions, and how busy the machine is with other things."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(name: str, found: dict[str, Any], table: str) -> None:
    """Print a result and keep it beside the others, for programs and for readers."""
    found = {"machine": describe_machine()} | found
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    (RESULTS / f"{name}.md").write_text(f"# {name}\n\n{table}\n\nMeasured on: {machine}.\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def table_of(rows: list[list[str]]) -> str:
    """Markdown; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
