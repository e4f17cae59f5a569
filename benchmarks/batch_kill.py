"""Kill a batch job 20 times, everything at once, at random moments; compare with one undisturbed.

python benchmarks/batch_kill.py --items 5000 --kills 20 --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import save, table_of

MODEL = "spanwise/tiny-dense"
_BAD_EVERY = 500
_DEADLINE_S = 1800.0


def write_requests(path: Path, num_items: int, chance: random.Random) -> None:
    """Greedy, seeded and unseeded requests, one of 500 broken."""
    with path.open("w") as file:
        for index in range(num_items):
            body: dict[str, Any] = {"prompt": f"def f{index}(", "max_tokens": chance.randint(1, 9)}
            body |= ({"temperature": 0}, {"seed": index}, {})[index % 3]
            if index % _BAD_EVERY == 77:
                body["temperature"] = "hot"
            line = {"custom_id": f"c{index}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(line | {"body": body}) + "\n")


def command(source: Path, output: Path) -> list[str]:
    """The job, in a process of its own."""
    program = [sys.executable, "-m", "spanwise", "batch", MODEL, "--dtype", "float32", "--quiet"]
    return [*program, "--input", str(source), "--output", str(output)]


def files(output: Path) -> list[Path]:
    """What a job leaves for its user."""
    return [output, Path(f"{output}.errors.jsonl")]


def killed(job: list[str], output: Path, after_s: float) -> dict[str, Any]:
    """Begin, kill the process group so long after, and say what was there then."""
    process = subprocess.Popen(job, start_new_session=True)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    found = output.read_bytes().count(b"\n") if output.exists() else 0
    return {"after_s": round(after_s, 3), "was_killed": code == -signal.SIGKILL, "lines": found}


def run(num_items: int, num_kills: int, seed: int) -> dict[str, Any]:
    """One undisturbed run, then one that is killed again and again."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        source, calm, torn = (Path(folder) / name for name in ("in.jsonl", "calm", "torn"))
        write_requests(source, num_items, chance)
        began_s = time.monotonic()
        subprocess.run(command(source, calm), check=True, timeout=_DEADLINE_S)
        calm_s = time.monotonic() - began_s
        # The start is a part of every run: kills fall into it, too, and leave time for progress.
        longest_s = 2 * calm_s / num_kills + 8
        job = command(source, torn)
        kills = [killed(job, torn, chance.uniform(0.05, longest_s)) for _ in range(num_kills)]
        subprocess.run(job, check=True, timeout=_DEADLINE_S)
        return judged(num_items, calm_s, kills, files(calm), files(torn))


def judged(
    num_items: int, calm_s: float, kills: list[dict[str, Any]], calm: list[Path], torn: list[Path]
) -> dict[str, Any]:
    """Whether nothing is missing, double or different."""
    ids = [
        int(json.loads(line)["id"].removeprefix("batch_req_"))
        for path in torn
        for line in path.read_text().splitlines()
    ]
    return {
        "items": num_items,
        "undisturbed_s": round(calm_s, 1),
        "kills": kills,
        "num_errors": torn[1].read_bytes().count(b"\n"),
        "each_once": sorted(ids) == list(range(num_items)),
        "identical": [a.read_bytes() for a in calm] == [b.read_bytes() for b in torn],
        "sha256": hashlib.sha256(torn[0].read_bytes()).hexdigest(),
    }


def page(found: dict[str, Any]) -> str:
    """The table, and what it says."""
    rows = [["run", "killed after s", "killed", "lines in the output then"]]
    for number, kill in enumerate(found["kills"], 1):
        said = "yes" if kill["was_killed"] else "was done before"
        rows.append([str(number), f"{kill['after_s']:.2f}", said, str(kill["lines"])])
    num_killed = sum(kill["was_killed"] for kill in found["kills"])
    return table_of(rows) + (
        f"\n\n{found['items']} requests to {MODEL}, {found['num_errors']} of them broken; "
        f"undisturbed {found['undisturbed_s']} s. {num_killed} times every process was killed "
        "with SIGKILL, then the job was run to its end. "
        f"Each item once in output or error file: {'holds' if found['each_once'] else 'MISSED'}; "
        f"both files the bytes of the undisturbed run: "
        f"{'holds' if found['identical'] else 'MISSED'}."
    )


def main() -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = run(options.items, options.kills, options.seed)
    save("batch_kill", found, page(found))
    return 0 if found["each_once"] and found["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
