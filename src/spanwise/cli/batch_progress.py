"""How far a job is, on standard error."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spanwise.cli.bench_progress import ProgressLine
from spanwise.jobs.job import JobProgress

_LINE_S = 0.1
_NOTE_S = 30.0
_LATE_S = 20.0


class Pace:
    """Items a second, as of late, and the time left."""

    def __init__(self, num_done: int, now_s: float) -> None:
        self._num_done, self._now_s = num_done, now_s
        self._age_s = 0.0
        self.rate = 0.0

    def take(self, num_done: int, now_s: float) -> None:
        """Take how far it is now."""
        elapsed_s = max(now_s - self._now_s, 1e-9)
        rate = (num_done - self._num_done) / elapsed_s
        self._age_s += elapsed_s
        # At first the mean of all, later of about so many seconds.
        share = max(elapsed_s / self._age_s, 1 - math.exp(-elapsed_s / _LATE_S))
        self.rate += share * (rate - self.rate)
        self._num_done, self._now_s = num_done, now_s

    def line(self, progress: JobProgress) -> str:
        """All of it in one line."""
        left = progress.num_items - progress.num_done
        share = 100 * progress.num_done / max(progress.num_items, 1)
        errors = f", {progress.num_errors:,} errors" if progress.num_errors else ""
        time_left = f", {_clock(left / self.rate)} left" if self.rate > 0 else ""
        return (
            f"{progress.num_done:,} of {progress.num_items:,} items ({share:.0f}%){errors}: "
            f"{self.rate:.1f} items/s{time_left}"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


@contextmanager
def watched(quiet: bool) -> Iterator[Callable[[JobProgress], None]]:
    """Give a callback that takes the progress: one moving line, or one each half minute."""
    line = ProgressLine(quiet)
    every_s = _LINE_S if line.is_shown else _NOTE_S
    pace: Pace | None = None
    shown_s = time.monotonic()

    def tell(progress: JobProgress) -> None:
        nonlocal pace, shown_s
        now_s = time.monotonic()
        pace = pace or Pace(progress.num_done, now_s)
        if quiet or now_s - shown_s < every_s:
            return
        shown_s = now_s
        pace.take(progress.num_done, now_s)
        if line.is_shown:
            line.show(pace.line(progress))
        else:
            print(pace.line(progress), file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        line.clear()
