"""One call of attention in this process: its memory, or its time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from spanwise.bench.job import AttentionJob, AttentionResult
from spanwise.device.devices import parse_devices
from spanwise.device.memory import place, synchronize
from spanwise.device.peak import PeakMemory
from spanwise.errors import InputError, reason

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_WARMUP_LENGTH = 64


def standard_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``[1, heads, length, head_dim]``: every score, then every probability, stands in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores, dim=-1) @ v


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by blocks (Dao et al. 2022, arXiv:2205.14135): no score outlives its block."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


_METHODS: dict[str, Attention] = {"standard": standard_attention, "flash": flash_attention}


@torch.inference_mode()
def run_attention(job: AttentionJob) -> AttentionResult:
    """Measure. Raises DeviceError, or InputError where torch has no such kernel."""
    spec = parse_devices(job.device)[0]
    device = place(spec)
    if spec.kind == "cpu":
        torch.set_num_threads(spec.threads)
    attention = _METHODS[job.method]
    try:
        attention(*_inputs(job, _WARMUP_LENGTH, device))  # libraries set themselves up
        inputs = _inputs(job, job.length, device)
        added_bytes = None if job.num_runs else _memory(attention, inputs, device)
        times_s = _times(attention, inputs, device, job.num_runs)
    except RuntimeError as error:
        raise InputError(
            f"{job.method} attention in {job.dtype} over {job.length} tokens does not run on "
            f"{spec}: {reason(error)}; choose another --dtype, --head-dim or --lengths"
        ) from error
    return AttentionResult(
        input_bytes=sum(tensor.nbytes for tensor in inputs),
        added_bytes=added_bytes,
        times_s=times_s,
    )


def _inputs(
    job: AttentionJob, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype: torch.dtype = getattr(torch, job.dtype)
    shape = (1, job.num_heads, length, job.head_dim)
    generator = torch.Generator(device).manual_seed(length)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    return q, k, v


def _memory(
    attention: Attention,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    device: torch.device,
) -> int:
    peak = PeakMemory(device)
    attention(*inputs)
    return peak.added_bytes()


def _times(
    attention: Attention,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    device: torch.device,
    num_runs: int,
) -> tuple[float, ...]:
    """Seconds of each call but a first that is not counted."""
    times_s = []
    for _ in range(num_runs + 1 if num_runs else 0):
        synchronize(device)
        begin_s = time.perf_counter()
        attention(*inputs)
        synchronize(device)
        times_s.append(time.perf_counter() - begin_s)
    return tuple(times_s[1:])
