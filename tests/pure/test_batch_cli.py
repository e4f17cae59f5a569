"""``spanwise batch`` before any model is touched, and what it says of its progress."""

from __future__ import annotations

import pytest
from tests.pure.test_cli_help import spanwise

from spanwise.cli.batch_progress import Pace
from spanwise.jobs.job import JobProgress


def test_help_imports_nothing_heavy_and_ends_with_examples() -> None:
    answer = spanwise("batch", "--help", probe=True)
    assert answer.returncode == 0 and answer.stderr == "[]\n"
    _, _, tail = answer.stdout.partition("Examples:\n")
    assert sum(line.startswith("  ") for line in tail.splitlines()) == 8
    assert all(len(line) <= 80 for line in tail.splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["batch"], "MODEL"),
        (["batch", "m", "--output", "o"], "--input"),
        (["batch", "m", "--input", "i"], "--output"),
        (["batch", "m", "--input", "i", "--output", "-"], "--output must be a file"),
        (["batch", "m", "--input", "i", "--output", "o", "--max-batch-size", "0"], "1 or more"),
        (["batch", "m", "--input", "i", "--output", "o", "--max-tokens", "x"], "--max-tokens"),
        (["batch", "m", "--input", "no such", "--output", "o"], "no input no such"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], said: str) -> None:
    answer = spanwise(*arguments)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("spanwise: ") and answer.stderr.count("\n") == 1
    assert said in answer.stderr


def test_the_pace_is_that_of_late_and_of_this_run() -> None:
    pace = Pace(1000, 50.0)  # done by runs before
    pace.take(1100, 60.0)
    assert pace.rate == pytest.approx(10)
    pace.take(1110, 61.0)
    assert pace.rate == pytest.approx(10)
    for second in range(62, 200):
        pace.take(1110 + (second - 61) * 2, float(second))
    assert pace.rate == pytest.approx(2, rel=0.05)
    line = pace.line(JobProgress(10_000, 2_000, 3))
    assert line.startswith("2,000 of 10,000 items (20%), 3 errors: 2.0 items/s, 1:0")
    assert line.endswith(" left")


def test_no_time_is_told_before_anything_has_come() -> None:
    assert Pace(5, 0.0).line(JobProgress(10, 5, 0)) == "5 of 10 items (50%): 0.0 items/s"
