"""8-bit floats as float64 has them, on any device."""

from __future__ import annotations

import torch

from spanwise.device.fp8 import Fp8Linear

SHAPES = ((1, 1), (7, 5), (192, 576), (1280, 1920), (100, 33))  # (in, out)
LARGEST = 448.0


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, torch.bfloat16)


def steps(of: torch.Tensor) -> torch.Tensor:
    """What the largest number of the format stands for, in each row of ``of``."""
    return of.abs().amax(1, keepdim=True).double() / LARGEST


def nearest(values: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 numbers, ties to the even one; float64."""
    quantum = 2.0 ** (values.abs().clamp_min(2.0**-6).log2().floor() - 3)
    return (values / quantum).round() * quantum


def exact(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden.double() @ weight.double().T


def emulated(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of what the format keeps of both, in float64."""
    of_hidden, of_weight = steps(hidden), steps(weight)
    kept = nearest(hidden.double() / of_hidden), nearest(weight.double() / of_weight)
    return exact(*kept) * of_hidden * of_weight.T


def worst_error(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """No product may be further from the exact one than this, ``[tokens, out]``.

    A number is off by a sixteenth of itself at most, and a small one by half the distance of the
    smallest two, 2**-9 of a step. The result is rounded to bfloat16; sums are float32.
    """
    x, w = hidden.double().abs(), weight.double().abs()
    off_x = torch.maximum(x / 16, steps(hidden) * 2**-10) * 1.0001
    off_w = torch.maximum(w / 16, steps(weight) * 2**-10) * 1.0001
    error = exact(off_x, w) + exact(x, off_w) + exact(off_x, off_w)
    return error + (exact(hidden, weight).abs() + error) * 2**-8 + exact(x, w) * 1e-4


def check_product(shape: tuple[int, int], device: str) -> None:
    """By rows a million times as large as others, within the error of the format."""
    weight = normal(*reversed(shape), device=device)
    scales = torch.logspace(-3, 3, 9, device=device)[:, None]
    hidden = (normal(9, shape[0], seed=1, device=device) * scales).bfloat16()
    out = Fp8Linear(weight)(hidden)
    assert out.dtype == torch.bfloat16 and out.shape == (9, shape[1])
    error = (out.double() - exact(hidden, weight)).abs()
    assert bool((error <= worst_error(hidden, weight)).all())


def rounding_ratio(layer: Fp8Linear, hidden: torch.Tensor, weight: torch.Tensor) -> float:
    """How far from the emulated product, in errors of one rounding to bfloat16."""
    wanted = emulated(hidden, weight)
    error = (layer(hidden).double() - wanted).square().mean().sqrt()
    return float(error / (wanted.square().mean().sqrt() * 2**-9))
