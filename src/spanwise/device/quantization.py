"""Which devices compute with which quantization. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from spanwise.device.devices import cpu_hint, cuda_capabilities
from spanwise.errors import DeviceError
from spanwise.types.worker import DeviceSpec, Quantization

DTYPES: dict[Quantization, tuple[str, ...]] = {
    "int8": ("bfloat16", "float32"),
    "fp8": ("bfloat16",),
}
"""What is computed in between products."""

_LEAST_FP8 = (8, 9)
_FP8_CARDS = "CUDA cards of compute capability 8.9 or more"


def check_devices(quantization: Quantization, devices: Sequence[DeviceSpec]) -> None:
    """Raise DeviceError for the first device that has no such numbers."""
    check = _check_int8 if quantization == "int8" else _check_fp8
    for device in devices:
        check(device)


def _check_int8(device: DeviceSpec) -> None:
    if device.kind == "cuda":
        raise DeviceError(
            f"quantization int8 is for CPU devices, not for {device}; leave it out, use fp8 on "
            f"{_FP8_CARDS}, or use {cpu_hint()}"
        )


def _check_fp8(device: DeviceSpec) -> None:
    if device.kind == "cpu":
        raise DeviceError(
            f"quantization fp8 is for {_FP8_CARDS}, not for {device}; use int8 on CPU devices, or "
            "leave it out"
        )
    major, minor = cuda_capabilities()[device.index]
    if (major, minor) < _LEAST_FP8:
        raise DeviceError(
            f"quantization fp8 is for {_FP8_CARDS}, {device} has {major}.{minor}; leave it out"
        )
