"""A Python process of ours that is started anew, not forked: the engine's, an HTTP process's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from spanwise.worker.lifeline import Lifeline

# What one large request took goes back to the system with it. Without this, glibc raises the size
# from which it does so with every large block that is freed.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


class PythonProcess:
    """``python -m module fd... argument...``, killed by the kernel when this process is gone.

    The module gets the numbers of the open files given, the lifeline's after them, and then the
    arguments.
    """

    def __init__(self, module: str, fds: Sequence[int], arguments: Sequence[str] = ()) -> None:
        self._lifeline = Lifeline()
        numbers = [str(fd) for fd in (*fds, self._lifeline.read_fd)]
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *numbers, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout belongs to the user's own output
            env=_ENVIRONMENT | os.environ | {"PYTHONPATH": python_path()},
            pass_fds=(*fds, self._lifeline.read_fd),
            start_new_session=True,
        )
        self._lifeline.close_read()
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens where it has ended."""
        self._popen.send_signal(number)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for its end: its exit code (minus a signal), or None when the time is up."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def end(self, timeout_s: float) -> int:
        """Wait so long for its end, then kill it. Returns the exit code. May be called again."""
        self.wait(timeout_s)
        self._lifeline.cut()
        code = self._popen.wait()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        return code


def python_path() -> str:
    """What this process imports from, so that a process it starts finds the same."""
    return os.pathsep.join(os.path.abspath(path) for path in sys.path)
