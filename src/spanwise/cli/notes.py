"""What the program says beside the answer, all of it on standard error."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from rich.console import Console

from spanwise.cli.byte_size import format_bytes
from spanwise.cli.stopping import undone_when_stopped
from spanwise.engine.launch import DeviceUse, EnginePlan
from spanwise.types.outputs import RequestOutput


class Notes:
    """Lines and, on a terminal, moving ones; nothing at all when quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._moving = self._console.is_terminal and not quiet
        if not self._moving:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def line(self, text: str) -> None:
        """Say one line."""
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def starting(self) -> Iterator[Callable[[str], None]]:
        """Give a callback that shows how far the start has come."""
        if not self._moving:
            yield lambda _: None
            return
        status = self._console.status("")

        def show(line: str) -> None:
            status.update(line)
            status.start()  # now first: a download before it shows progress of its own

        with undone_when_stopped(_show_cursor):
            try:
                yield show
            finally:
                status.stop()

    @contextmanager
    def counting(self, total: int) -> Iterator[Callable[[RequestOutput], None]]:
        """Give a callback that moves a progress bar, one finished request a call."""
        if not self._moving:
            yield lambda _: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=self._console)
        task = bar.add_task("prompts", total=total)
        with undone_when_stopped(_show_cursor), bar:
            yield lambda _: bar.advance(task)


class LoggedNotes(Notes):
    """Each line as a JSON object, as the server's processes write theirs; nothing moves."""

    def __init__(self, quiet: bool) -> None:
        from spanwise.server.logs import write_logs

        super().__init__(quiet)
        self._moving = False
        write_logs("json")

    def line(self, text: str) -> None:
        """Log one line."""
        if not self._quiet:
            logging.getLogger("spanwise").info("%s", text)


def _show_cursor() -> None:
    """Clear the moving line; by hand, since a signal may have come while rich holds its lock."""
    os.write(sys.stderr.fileno(), b"\r\x1b[2K\x1b[?25h")


def plan_line(plan: EnginePlan) -> str:
    """Say what was decided: model, layout, bytes for each device."""
    groups = groupby(plan.ranks, lambda use: (use.weight_bytes, use.cache_bytes))
    uses = "; ".join(_use(list(group)) for _, group in groups)
    return f"plan: {plan.model} ({plan.architecture}, {plan.dtype}): {plan.layout}; {uses}"


def _use(alike: Sequence[DeviceUse]) -> str:
    names = ", ".join(use.device for use in alike)
    weights, cache = format_bytes(alike[0].weight_bytes), format_bytes(alike[0].cache_bytes)
    return f"{names}{' each' if len(alike) > 1 else ''} {weights} weights + {cache} cache"


def speed_line(results: Sequence[RequestOutput], elapsed_s: float, plan: EnginePlan) -> str:
    """Say how many tokens came, and how fast for each device."""
    num_prompt = sum(len(result.prompt_token_ids) for result in results)
    num_tokens = sum(len(choice.token_ids) for result in results for choice in result.outputs)
    num_devices = len({use.device for use in plan.ranks})
    rate = num_tokens / max(elapsed_s, 1e-9)
    devices = "1 device" if num_devices == 1 else f"{num_devices} devices"
    return (
        f"done: {num_prompt} tokens read, {num_tokens} generated in {elapsed_s:.2f} s "
        f"on {devices}: {rate:.1f} tokens/s, {rate / num_devices:.1f} tokens/s per device"
    )
