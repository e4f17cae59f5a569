"""Sleeping on a word of shared memory until another process changes it (futex(2)); a memory fence.

Where the number of the system call is not known, ``wait`` gives up the processor once and returns;
callers look again in a loop anyway.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
import threading

_MACHINE = platform.machine()
_LINUX_64 = sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8
_NUMBER = {"x86_64": 202, "aarch64": 98}.get(_MACHINE) if _LINUX_64 else None

TOTAL_STORE_ORDER = _MACHINE in ("x86_64", "AMD64", "i686")
"""True where the processor never reorders two stores or two loads, only a store with a later load.

There, data written before a count is seen before that count with no fence at all (and the compiler
cannot mix them up: each is a call of its own from the interpreter)."""

_WAIT, _WAKE = 0, 1
_EVERYBODY = 2**31 - 1


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Fence:
    """A full memory barrier for the calling thread: everything before is seen before what follows.

    Pure Python has none, but an uncontended lock is made of atomic read-modify-write instructions.
    On x86 each of those is a full barrier, so taking and freeing a lock once is enough. On ARMv8
    freeing is a store-release and taking a load-acquire: what comes before the first freeing stays
    before it, what follows the second taking stays after it, and a release is never reordered with
    a later acquire, so doing it twice is a full barrier. Costs some 50 ns and no system call. One
    for each thread that uses it: sharing would make it contended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Order all memory accesses before the call before all after it."""
        lock = self._lock
        lock.acquire()
        lock.release()
        if not TOTAL_STORE_ORDER:
            lock.acquire()
            lock.release()


def wait(address: int, expected: int, timeout_s: float) -> None:
    """Sleep while the word at ``address`` is ``expected``, at most ``timeout_s``.

    May return early (a signal, a wake-up meant for an earlier sleep); the caller looks again.
    """
    if _NUMBER is None:
        os.sched_yield()
        return
    seconds = int(timeout_s)
    limit = _TimeSpec(seconds, int((timeout_s - seconds) * 1e9))
    if _futex(address, _WAIT, expected, ctypes.byref(limit)) < 0:
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
            raise OSError(code, os.strerror(code))


def wake(address: int) -> None:
    """Wake everybody who sleeps on the word at ``address``."""
    if _NUMBER is not None:
        _futex(address, _WAKE, _EVERYBODY, None)


def _futex(address: int, operation: int, value: int, limit: object) -> int:
    # Not the private kind: the sleepers are other processes.
    return int(
        _libc.syscall(
            ctypes.c_long(_NUMBER or 0),
            ctypes.c_void_p(address),
            ctypes.c_int(operation),
            ctypes.c_uint32(value),
            limit,
            None,
            ctypes.c_int(0),
        )
    )
