from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

# Every process of this run inherits the mark, so that an orphan can be told from a stranger.
_MARK = "SPANWISE_TEST_RUN"
_RUN = uuid.uuid4().hex
os.environ[_MARK] = _RUN
# Before anything imports transformers, which reads them once.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

_TESTS = Path(__file__).resolve().parent
_SHM = Path("/dev/shm")
_GRACE_S = 5.0  # what a closing process may take; the machine may be busy
_WITHOUT_TORCH = {"arch", "pure", "sim"}
_WITH_PROCESSES = {"multi", "server"}

# A shared machine makes any single example slow now and then: no deadline.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def _room(path: Path) -> str:
    """The folder under tests/ that says what a test needs."""
    return path.resolve().relative_to(_TESTS).parts[0]


# --- which tests run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = set()
    if not config.getoption("--full"):
        left_out |= {item for item in items if item.get_closest_marker("full")}
    on_gpu = {item for item in items if item.get_closest_marker("gpu")}
    if on_gpu and not _has_cuda():
        left_out |= on_gpu
    if not (shutil.which("chromium") and find_spec("playwright")):
        left_out |= {item for item in items if item.get_closest_marker("browser")}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread wherever torch computes in this process, before any fixture builds a model."""
    if _room(item.path) not in _WITHOUT_TORCH:
        import torch

        torch.set_num_threads(1)


# --- nothing may be left behind


@pytest.fixture(scope="session", autouse=True)
def nothing_left_by_the_run() -> Iterator[None]:
    with _nothing_left():
        yield


@pytest.fixture(autouse=True)
def nothing_left_by_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fixtures of a wider scope come first, so what they keep running is no leftover."""
    with _nothing_left() if _room(request.path) in _WITH_PROCESSES else nullcontext():
        yield


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Fail if processes or shared memory outlive the block; then end the processes."""
    processes_before, shm_before = _processes(), _shm_entries()
    yield
    deadline = time.monotonic() + _GRACE_S
    while True:
        processes = {
            process
            for process in _processes() - processes_before
            if not _belongs_to(process, processes_before)
        }
        shm = _unclaimed(_shm_entries() - shm_before)
        if not processes and not shm:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    left = [_describe(process) for process in processes] + [f"/dev/shm/{name}" for name in shm]
    _kill(processes)
    pytest.fail(f"left behind: {'; '.join(sorted(left))}", pytrace=False)


def _processes() -> set[psutil.Process]:
    """What this run started and still lives: its children, and orphans that carry its mark."""
    this = psutil.Process()
    found = set(this.children(recursive=True))
    found |= {process for process in psutil.process_iter() if _carries_mark(process)}
    return {process for process in found - {this} if _is_alive(process)}


def _belongs_to(process: psutil.Process, others: set[psutil.Process]) -> bool:
    """Whether one of them started it: a fixture's server that lives on may replace its own."""
    try:
        return not others.isdisjoint(process.parents())
    except psutil.NoSuchProcess:
        return False


def _carries_mark(process: psutil.Process) -> bool:
    try:
        return process.environ().get(_MARK) == _RUN
    except psutil.Error:  # gone meanwhile, or another user's
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # multiprocessing starts one for the life of its parent, on the first named semaphore.
        return not any("resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} ({' '.join(process.cmdline())[:120]})"
    except psutil.NoSuchProcess:
        return f"process {process.pid}"


def _kill(processes: set[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(list(processes), timeout=_GRACE_S)


def _shm_entries() -> set[str]:
    if not _SHM.is_dir():
        return set()
    entries = set()
    for path in _SHM.iterdir():
        try:
            if path.stat().st_uid == os.getuid():
                entries.add(path.name)
        except FileNotFoundError:  # removed between the listing and the look
            continue
    return entries


def _unclaimed(names: set[str]) -> set[str]:
    """Those that no stranger has mapped: other programs of this user may come and go meanwhile."""
    if not names:
        return names
    ours = _processes() | {psutil.Process()}
    strangers = (process for process in psutil.process_iter() if process not in ours)
    mapped = {Path(path).name for process in strangers for path in _mapped_files(process)}
    return names - mapped


def _mapped_files(process: psutil.Process) -> list[str]:
    try:
        return [region.path for region in process.memory_maps()]
    except psutil.Error:
        return []
