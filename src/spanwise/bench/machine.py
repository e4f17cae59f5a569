"""Where a number was measured: no number stands without it."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

from spanwise.device.devices import cuda_cards, host_memory

_BUSY = 0.3


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Processor, memory, versions, and how busy the machine was with other things."""

    cpu: str
    cores: int
    memory_bytes: int
    cards: tuple[str, ...]
    kernel: str
    python: str
    torch: str
    transformers: str
    load_average: float
    when: str

    @property
    def is_busy(self) -> bool:
        """Whether something else took a good part of it in the minute before."""
        return self.load_average > _BUSY * self.cores

    def line(self) -> str:
        """One line under a figure."""
        where = f"{self.cpu}, {self.cores} cores"
        cards = f", {', '.join(self.cards)}" if self.cards else ""
        busy = f", busy before (load {self.load_average:g})" if self.is_busy else ""
        return f"{where}{cards}, torch {self.torch}, {self.when[:10]}{busy}"


def describe_machine() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=host_memory()[0],
        cards=tuple(name for name, _, _ in cuda_cards()),
        kernel=platform.release(),
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        load_average=round(os.getloadavg()[0], 2),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
