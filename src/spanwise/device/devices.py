"""Which devices there are, and what a caller means by ``cpu:4`` or ``cuda:0,1``.

Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import psutil
import pynvml

from spanwise.errors import DeviceError
from spanwise.layout.split import split_evenly
from spanwise.types.worker import DeviceSpec

T = TypeVar("T")

_CPU = re.compile(r"cpu(?::(\d+))?")
_CUDA = re.compile(r"cuda(?::(\d+(?:\*\d+)?(?:,\d+(?:\*\d+)?)*))?")
_EXAMPLES = "cpu, cpu:4, cuda, cuda:0,1 or cuda:0*2"
_CGROUP = Path("/sys/fs/cgroup")


def parse_devices(wanted: str | None, num_ranks: int | None = None) -> tuple[DeviceSpec, ...]:
    """The devices a caller names; None takes every CUDA card, else the CPU.

    ``cpu:4`` is four devices sharing the cores there are, ``cuda:0*2`` two ranks on one card. The
    plain ``cpu`` is one device, or ``num_ranks`` where a layout wants more. Raises DeviceError.
    """
    if wanted is None:
        cards = len(cuda_cards())
        return _cuda([(i, 1) for i in range(cards)]) if cards else _cpu(num_ranks or 1)
    text = wanted.strip()
    if match := _CPU.fullmatch(text):
        count = int(match[1]) if match[1] else (num_ranks or 1)
        if not 1 <= count <= 1024:
            raise DeviceError(f"devices {wanted!r}: give from 1 to 1024 CPU devices")
        return _cpu(count)
    if match := _CUDA.fullmatch(text):
        cards = len(cuda_cards())
        if not match[1] and not cards:
            raise DeviceError(
                f"devices {wanted!r}: no CUDA card is there{_why()}; use {cpu_hint()}"
            )
        parts = (match[1] or ",".join(map(str, range(cards)))).split(",")
        named = [(int(i), int(share or 1)) for i, _, share in (p.partition("*") for p in parts)]
        _check_cards(wanted, named, cards)
        return _cuda(named)
    raise DeviceError(f"devices {wanted!r} cannot be read; write {_EXAMPLES}")


def _check_cards(wanted: str, named: list[tuple[int, int]], cards: int) -> None:
    for index, share in named:
        if index >= cards:
            there = f"there are {cards}, numbered from 0" if cards else f"there is none{_why()}"
            raise DeviceError(
                f"devices {wanted!r}: CUDA card {index} is not there ({there}); use {cpu_hint()}"
            )
        if share < 1:
            raise DeviceError(f"devices {wanted!r}: a card is shared by at least 1 rank")
    if len({index for index, _ in named}) < len(named):
        raise DeviceError(f"devices {wanted!r} name a card twice; write cuda:0*2 to share it")


def cpu_hint() -> str:
    """What always works, as a flag."""
    return "--devices cpu"


def _cpu(count: int) -> tuple[DeviceSpec, ...]:
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        groups: list[tuple[int, ...]] = [(cores[i % len(cores)],) for i in range(count)]
    else:
        groups = [tuple(cores[i] for i in share) for share in split_evenly(len(cores), count)]
    return tuple(
        DeviceSpec(kind="cpu", index=i, cores=group, threads=len(group))
        for i, group in enumerate(groups)
    )


def _cuda(named: list[tuple[int, int]]) -> tuple[DeviceSpec, ...]:
    return tuple(
        DeviceSpec(kind="cuda", index=index, share=share)
        for index, share in named
        for _ in range(share)
    )


def cuda_cards() -> list[tuple[str, int, int]]:
    """Name, bytes in all and bytes free of every CUDA card torch can use, asked of the driver.

    In the order of the bus, in which the workers' CUDA counts too (CUDA_DEVICE_ORDER is set for
    them); of the cards that CUDA_VISIBLE_DEVICES names where it is set.
    """
    return _of_cards(_card)


def cuda_capabilities() -> list[tuple[int, int]]:
    """Compute capability, major and minor, of the same cards in the same order."""
    return _of_cards(_capability)


def _of_cards(ask: Callable[[object], T]) -> list[T]:
    if _torch_build().endswith("+cpu"):
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: no card
        return []
    try:
        return [ask(handle) for handle in _visible_cards(os.environ.get("CUDA_VISIBLE_DEVICES"))]
    finally:
        pynvml.nvmlShutdown()


def _capability(handle: object) -> tuple[int, int]:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return int(major), int(minor)


def _card(handle: object) -> tuple[str, int, int]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return str(pynvml.nvmlDeviceGetName(handle)), memory.total, memory.free


def _visible_cards(visible: str | None) -> list[object]:
    """Handles in CUDA's order. CUDA takes numbers and beginnings of UUIDs, up to a wrong one."""
    count = pynvml.nvmlDeviceGetCount()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    if visible is None:
        return handles
    found: list[object] = []
    for word in visible.split(","):
        chosen = _find_card(word.strip(), handles)
        if chosen is None:
            break
        found.append(chosen)
    return found


def _find_card(word: str, handles: list[object]) -> object | None:
    if word.isdigit():
        return handles[int(word)] if int(word) < len(handles) else None
    if word.startswith("MIG-"):  # a part of a card, which no index names
        try:
            handle: object = pynvml.nvmlDeviceGetHandleByUUID(word)
        except pynvml.NVMLError:
            return None
        return handle
    fitting = (h for h in handles if word and str(pynvml.nvmlDeviceGetUUID(h)).startswith(word))
    return next(fitting, None)


def _torch_build() -> str:
    """The version of torch, which says what it was built for, without importing it."""
    return version("torch")


def _why() -> str:
    """What hides a card from torch, where something does."""
    build = _torch_build()
    return f" for torch {build}, a build without CUDA" if build.endswith("+cpu") else ""


def host_memory() -> tuple[int, int]:
    """Bytes of memory this process may use in all, and bytes free: the host's or the cgroup's."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and used is not None:
        # Page cache counts as used in a cgroup, and is given back when memory is wanted.
        used -= _cgroup_cache()
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _cgroup_bytes(name: str) -> int | None:
    path = _CGROUP / name
    text = path.read_text().strip() if path.is_file() else "max"
    return None if text == "max" else int(text)


def _cgroup_cache() -> int:
    path = _CGROUP / "memory.stat"
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
