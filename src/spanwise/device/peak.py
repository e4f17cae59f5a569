"""The most memory that something takes while it runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from spanwise.device.memory import synchronize
from spanwise.errors import DeviceError

_STATUS = re.compile(rb"^Vm(HWM|RSS):\s*(\d+) kB", re.MULTILINE)
_RESET_PEAK = b"5"  # proc(5), clear_refs


class PeakMemory:
    """The peak of this process's memory on a device, from now on.

    On a card: what torch allocates there. On a CPU: what is resident of the whole process, so
    nothing else may go on in it; memory that was freed before and kept by the allocator hides what
    takes its place. Raises DeviceError where the kernel does not reset a peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            _reset_peak()
            self._before = _resident_bytes()["RSS"]

    def added_bytes(self) -> int:
        """The peak since then, less what was in use then."""
        synchronize(self._device)
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _resident_bytes()["HWM"] - self._before)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_bytes(_RESET_PEAK)
    except OSError as error:
        raise DeviceError(
            f"the peak of a process's memory cannot be measured here ({error.strerror}: "
            "/proc/self/clear_refs); use a kernel with CONFIG_PROC_PAGE_MONITOR"
        ) from error


def _resident_bytes() -> dict[str, int]:
    found = _STATUS.findall(Path("/proc/self/status").read_bytes())
    return {name.decode(): int(kb) << 10 for name, kb in found}
