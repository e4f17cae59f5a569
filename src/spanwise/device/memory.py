"""One rank's device as torch knows it, and the memory there. The only user of ``torch.cuda``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch

from spanwise.device.devices import cpu_hint, host_memory
from spanwise.errors import DeviceError, reason
from spanwise.types.worker import DeviceSpec

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def place(spec: DeviceSpec) -> torch.device:
    """Give the torch device of a rank; a card becomes this process's current one.

    Call after the last fork, which CUDA does not survive. Raises DeviceError.
    """
    if spec.kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", spec.index)
    # Some container images turn TF32 on by their environment; float32 has to mean float32.
    torch.set_float32_matmul_precision("highest")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.set_device(device)
        free_bytes(device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA fails an assertion
        raise DeviceError(
            f"{spec} cannot be used by torch {torch.__version__}: {reason(error)}; mend the driver "
            f"or the torch build, or use {cpu_hint()}"
        ) from error
    return device


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory()[1]


def memory_use(spec: DeviceSpec) -> tuple[int, int]:
    """Bytes this process has in use on its device, and bytes there in all; waits for nothing.

    Of a CPU device all that is resident counts, also what forks share; all is the host's.
    """
    if spec.kind == "cpu":
        return psutil.Process().memory_info().rss, host_memory()[0]
    device = torch.device("cuda", spec.index)
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.memory_allocated(device), total


def synchronize(device: torch.device) -> None:
    """Wait until everything given to the device is done; an error of it is raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocate_arena(device: torch.device, num_bytes: int) -> torch.Tensor:
    """A flat byte tensor of zeros for a KV cache. Raises DeviceError.

    A plain allocation, which dies with its process: what outlives it on a card needs exportable
    memory, and whoever needs that asks for it here.
    """
    with claiming(device, num_bytes, "the KV cache"):
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


@contextmanager
def claiming(device: torch.device, num_bytes: int, purpose: str) -> Iterator[None]:
    """Allocate ``num_bytes`` for ``purpose`` inside; DeviceError where the card has no room."""
    free = free_bytes(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{device} has no room for {purpose}: {_mib(num_bytes)} wanted, {_mib(free)} free; use "
            "more devices, lower --kv-cache-memory or --max-model-len, or end what else uses it"
        ) from error


@contextmanager
def giving_back(device: torch.device) -> Iterator[None]:
    """Let large blocks that are freed inside go back to the system at once.

    While weights are brought into another form, each is freed when its copy is made. glibc would
    keep what is freed for later, and a rank would take up to twice its weights. Afterwards blocks
    below 32 MiB are kept again: those of a step, which come back with the next one.

    What is freed on a card, torch keeps; it goes back at the end, for other ranks there as well.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # another allocator, with ways of its own
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 18)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def move_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one dtype, made on the host, on the device: all in one copy that nobody waits for.

    Each copy by itself from ordinary memory would make the host wait for the device.
    """
    sizes = [tensor.numel() for tensor in tensors]
    parts = torch.split(_staged(tensors, device).to(device, non_blocking=True), sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def move_words(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """As ``move_together``, of dense tensors of any dtypes whose numbers have eight bytes."""
    if not tensors or device.type == "cpu":
        return list(tensors)
    words = move_together([tensor.view(torch.int64) for tensor in tensors], device)
    return [word.view(tensor.dtype) for word, tensor in zip(words, tensors, strict=True)]


def fetch_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one device on the host, all in one copy, which is waited for."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    fetched = torch.cat(flat).cpu()
    parts = torch.split(fetched, [part.numel() for part in flat])
    # A part may begin where a number of its kind must not.
    return [
        part.clone().view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def move_into(tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """As ``move_together``, one after the other into a flat tensor of just their size.

    What reads it is given to the device after this, and was before: the copy waits its turn there.
    """
    out.copy_(_staged(tensors, out.device), non_blocking=True)


def _staged(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Tensors made on the host as one that a device can fetch by itself.

    torch keeps such memory and gives it out again when the copy from it is done.
    """
    size = sum(tensor.numel() for tensor in tensors)
    whole = torch.empty(size, dtype=tensors[0].dtype, pin_memory=device.type == "cuda")
    return torch.cat([tensor.reshape(-1) for tensor in tensors], out=whole)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
