"""A limit on how long Python code of others may run."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeIsUpError(BaseException):
    """Raised within the limited block; no handler for ordinary errors catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block with ``TimeIsUpError`` when the time is up.

    For pure Python code, on any thread: a single call into C is not interrupted.
    """
    limit = _Limit(threading.get_ident())
    timer = threading.Timer(seconds, limit.strike)
    timer.daemon = True
    try:
        timer.start()
        yield
    finally:
        timer.cancel()
        limit.end()


class _Limit:
    def __init__(self, thread: int) -> None:
        self._thread = ctypes.c_ulong(thread)
        self._lock = threading.Lock()
        self._over = False

    def strike(self) -> None:
        with self._lock:
            if not self._over:
                self._raise(ctypes.py_object(TimeIsUpError))

    def end(self) -> None:
        """From here on nothing strikes; what has not yet arrived is taken back."""
        with self._lock:
            self._over = True
            self._raise(None)

    def _raise(self, error: ctypes.py_object[type[BaseException]] | None) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, error)
