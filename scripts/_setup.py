"""Make .venv ready: create it, and install the package with its tools, if anything changed.

Called by the entry points, under the machine's own Python; uses the standard library only. A stamp
in .venv says what it was made from, so an unchanged tree costs nothing. Safe when two run at once
(one waits) and after a run that was killed (what it left half-made is made again). The C kernels
have a stamp of their own: a change to them takes seconds.

With --lowest it is .venv-lowest, which holds the lowest versions that the package supports. With
--client NAME it is .venv-clients/NAME, which holds tests/server/clients/NAME.txt and not Spanwise.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
DEVICE = ROOT / "src" / "spanwise" / "device"
LOWEST_PYTHON = (3, 11)
HEARTBEAT_S = 30.0
PIP_INSTALL = ["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]


@dataclass(frozen=True)
class Environment:
    """A virtual environment: what pip installs into it, and the files that decide on that.

    The last of the files is its own.
    """

    folder: Path
    contents: str
    installed: tuple[str, ...]
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Where it is, as one would say it."""
        return str(self.folder.relative_to(ROOT))

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """What it was made from, once it is finished."""
        return self.folder / "spanwise-stamp"

    @property
    def unfinished(self) -> Path:
        """Is there while pip writes, so it survives a kill."""
        return self.folder / "spanwise-unfinished"


def chosen(arguments: list[str]) -> Environment:
    """The environment that the command line names."""
    project, bounds = ROOT / "pyproject.toml", ROOT / "scripts" / "constraints.txt"
    ours, words = "spanwise and its tools", ("-e", ".[dev]", "-c", str(bounds))
    match arguments:
        case []:
            return Environment(ROOT / ".venv", ours, words, (project, bounds))
        case ["--lowest"]:
            lowest = ROOT / "scripts" / "constraints-lowest.txt"
            words += ("-c", str(lowest))
            return Environment(ROOT / ".venv-lowest", ours, words, (project, bounds, lowest))
        case ["--client", name]:
            listed = ROOT / "tests" / "server" / "clients" / f"{name}.txt"
            words = ("-r", str(listed), "-c", str(bounds))
            return Environment(ROOT / ".venv-clients" / name, "a client", words, (bounds, listed))
    fail("usage: _setup.py [--lowest | --client NAME]")


def main() -> None:
    """Bring up to date what is not: the environment, and the C kernels in the tree."""
    if sys.version_info < LOWEST_PYTHON:
        fail(f"this is Python {version()}, 3.11 or newer is needed: set PYTHON=python3.11 or so")
    environment = chosen(sys.argv[1:])
    prepare(environment)
    if "--client" not in sys.argv:
        prepare_kernels(environment)


def prepare(environment: Environment) -> None:
    """Return at once when it is up to date; else bring it up to date, one process at a time."""
    wanted = stamp(environment)
    if is_ready(environment, wanted):
        return
    with environment.files[-1].open() as lock:  # outside the folder, which may be made anew
        wait_for_lock(environment.name, lock.fileno())
        if not is_ready(environment, wanted):
            make_ready(environment, wanted, lock.fileno())


def prepare_kernels(environment: Environment) -> None:
    """The same for the C kernels, which all environments share."""
    script, made = ROOT / "setup.py", ROOT / "build" / "kernels-stamp"
    sources = sorted((DEVICE / "kernels").glob("*.[ch]"))
    wanted = digest([text for path in (script, *sources) for text in (path.name, path.read_text())])

    def are_ready() -> bool:
        built = (DEVICE / "_kernels.so").exists()
        return built and made.exists() and made.read_text() == wanted

    if are_ready():
        return
    with script.open() as lock:
        wait_for_lock("the C kernels", lock.fileno())
        if are_ready():
            return
        say("compiling the C kernels")
        command = [str(environment.python), script.name, "--quiet", "build_ext", "--inplace"]
        if subprocess.run(command, cwd=ROOT, pass_fds=[lock.fileno()]).returncode != 0:
            fail("the C kernels do not compile; the reason stands above")
        made.write_text(wanted)


def stamp(environment: Environment) -> str:
    """A digest of all that it depends on. The root is part: an editable install points at it."""
    texts = [path.read_text() for path in environment.files]
    return digest([*texts, version(), str(ROOT)])


def digest(parts: list[str]) -> str:
    """A digest of all of them."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def version() -> str:
    """The running Python's version, as in 3.11.7."""
    return ".".join(map(str, sys.version_info[:3]))


def is_ready(environment: Environment, wanted: str) -> bool:
    """Whether it was finished from just these inputs."""
    made = environment.python.exists() and environment.stamp.exists()
    return made and environment.stamp.read_text() == wanted


def wait_for_lock(name: str, lock: int) -> None:
    """Take the lock; say so when another run holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another run is preparing {name}; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def make_ready(environment: Environment, wanted: str, lock: int) -> None:
    """Create it unless a whole one stands there, install into it, and stamp it."""
    started, name = time.monotonic(), environment.name
    if not is_whole(environment):
        create(environment)
    environment.stamp.unlink(missing_ok=True)
    environment.unfinished.touch()
    say(f"installing {environment.contents} into {name}; this takes minutes the first time")
    returncode = install(environment, lock)
    environment.unfinished.unlink()
    if returncode != 0:
        fail(f"pip could not install (exit code {returncode}); its reason stands above")
    environment.stamp.write_text(wanted)
    say(f"{name} is ready after {time.monotonic() - started:.0f} s")


def is_whole(environment: Environment) -> bool:
    """Whether it runs, is of this Python, has pip, and was not left in the middle of a write."""
    if environment.unfinished.exists() or not environment.python.exists():
        return False
    probe = "import pip, platform; print(platform.python_version())"
    command = [str(environment.python), "-c", probe]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip() == version()


def create(environment: Environment) -> None:
    """Make an empty one, in place of whatever is there."""
    say(f"making {environment.name} with Python {version()}")
    try:
        venv.create(environment.folder, clear=True, symlinks=True, with_pip=True)
    except subprocess.CalledProcessError:
        fail("this Python cannot make a virtual environment: install python3-venv or its like")


def install(environment: Environment, lock: int) -> int:
    """Run pip to its end and return its exit code.

    pip inherits the lock: should this process be killed, the next one still waits for pip.
    """
    command = [str(environment.python), *PIP_INSTALL, *environment.installed]
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


def fail(line: str) -> NoReturn:
    """End with one line that says what to do."""
    sys.exit(f"[setup] {line}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
