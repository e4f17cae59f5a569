"""Make .venv ready: create it, and install the package with its tools, if anything changed.

Called by the entry points, under the machine's own Python; uses the standard library only. A stamp
in .venv says what it was made from, so an unchanged tree costs nothing. Safe when two run at once
(one waits) and after a run that was killed (what it left half-made is made again).

With --lowest it is .venv-lowest, which holds the lowest versions that the package supports.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOWEST = sys.argv[1:] == ["--lowest"]
VENV = ROOT / (".venv-lowest" if LOWEST else ".venv")
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = [ROOT / "scripts" / "constraints.txt"]
if LOWEST:
    CONSTRAINTS.append(ROOT / "scripts" / "constraints-lowest.txt")
STAMP = VENV / "spanwise-stamp"
UNFINISHED = VENV / "spanwise-unfinished"  # is there while pip writes, so it survives a kill
LOWEST_PYTHON = (3, 11)
HEARTBEAT_S = 30.0
PIP_INSTALL = ["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]


def main() -> None:
    """Return at once when .venv is up to date; else bring it up to date, one process at a time."""
    if sys.version_info < LOWEST_PYTHON:
        fail(f"this is Python {version()}, 3.11 or newer is needed: set PYTHON=python3.11 or so")
    wanted = stamp()
    if is_ready(wanted):
        return
    with CONSTRAINTS[-1].open() as lock:  # outside .venv, which may be made anew
        wait_for_lock(lock.fileno())
        if not is_ready(wanted):
            make_ready(wanted, lock.fileno())


def stamp() -> str:
    """A digest of all that .venv depends on. The root is part: an editable install points at it."""
    texts = [path.read_text() for path in (ROOT / "pyproject.toml", *CONSTRAINTS)]
    parts = [*texts, version(), str(ROOT)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def version() -> str:
    """The running Python's version, as in 3.11.7."""
    return ".".join(map(str, sys.version_info[:3]))


def is_ready(wanted: str) -> bool:
    """Whether .venv was finished from just these inputs."""
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted


def wait_for_lock(lock: int) -> None:
    """Take the lock; say so when another run holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another run is preparing {VENV.name}; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def make_ready(wanted: str, lock: int) -> None:
    """Create .venv unless a whole one stands there, install into it, and stamp it."""
    started = time.monotonic()
    if not is_whole():
        create()
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()
    say(f"installing spanwise and its tools into {VENV.name}; this takes minutes the first time")
    returncode = install(lock)
    UNFINISHED.unlink()
    if returncode != 0:
        fail(f"pip could not install (exit code {returncode}); its reason stands above")
    STAMP.write_text(wanted)
    say(f"{VENV.name} is ready after {time.monotonic() - started:.0f} s")


def is_whole() -> bool:
    """Whether .venv runs, is of this Python, has pip, and was not left in the middle of a write."""
    if UNFINISHED.exists() or not PYTHON.exists():
        return False
    probe = [str(PYTHON), "-c", "import pip, platform; print(platform.python_version())"]
    answer = subprocess.run(probe, capture_output=True, text=True)
    return answer.stdout.strip() == version()


def create() -> None:
    """Make an empty .venv, in place of whatever is there."""
    say(f"making {VENV.name} with Python {version()}")
    try:
        venv.create(VENV, clear=True, symlinks=True, with_pip=True)
    except subprocess.CalledProcessError:
        fail("this Python cannot make a virtual environment: install python3-venv or its like")


def install(lock: int) -> int:
    """Run pip to its end and return its exit code.

    pip inherits the lock: should this process be killed, the next one still waits for pip.
    """
    constraints = [word for path in CONSTRAINTS for word in ("-c", str(path))]
    command = [str(PYTHON), *PIP_INSTALL, *constraints, "-e", ".[dev]"]
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, pass_fds=[lock]) as pip:
        while True:
            try:
                return pip.wait(HEARTBEAT_S)
            except subprocess.TimeoutExpired:
                say(f"still installing ({time.monotonic() - started:.0f} s)")


def say(line: str) -> None:
    """One line of progress, kept off stdout."""
    print(f"[setup] {line}", file=sys.stderr, flush=True)


def fail(line: str) -> None:
    """End with one line that says what to do."""
    sys.exit(f"[setup] {line}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
