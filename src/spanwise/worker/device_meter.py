"""How busy a rank's device is, and what of its memory is in use."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from spanwise.types.worker import DeviceReading


class DeviceMeter:
    """Around each step it sums the time spent; two looks at the clock, and nothing per token.

    ``memory`` gives the bytes in use and in all; it is asked when the meter is read.
    """

    def __init__(self, memory: Callable[[], tuple[int, int]]) -> None:
        self._memory = memory
        self._busy_s = self._begun_s = 0.0

    def __enter__(self) -> None:
        self._begun_s = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._busy_s += time.monotonic() - self._begun_s

    def read(self) -> DeviceReading:
        """What it shows now."""
        return DeviceReading(self._busy_s, time.monotonic(), *self._memory())
