"""Modules of a user's own, as ``module:factory`` names them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class ResidualMlp(nn.Module):
    """Tables of numbers to three scores."""

    def __init__(self, width: int = 24, depth: int = 6) -> None:
        super().__init__()
        self.entry = nn.Linear(10, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width)
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.entry(features)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)

    def example_inputs(self) -> dict[str, torch.Tensor]:
        return {"features": torch.zeros(10)}


class UNet(nn.Module):
    """Skips over all depths; takes images of any even sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1)
        self.bottom = nn.Conv2d(12, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.up1, self.up2 = nn.Conv2d(24, 6, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        one = F.relu(self.down1(image))
        two = F.relu(self.down2(F.max_pool2d(one, 2)))
        low = F.relu(self.norm(self.bottom(F.max_pool2d(two, 2))))
        low = F.interpolate(low, size=two.shape[-2:])
        up = F.relu(self.up1(torch.cat([low, two], 1)))
        up = F.interpolate(up, size=one.shape[-2:])
        return {"mask": self.up2(torch.cat([up, one], 1)), "bottom": two.mean((2, 3))}


class Choice(nn.Module):
    """What it computes depends on the numbers: torch.export cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if bool((x.abs().amax() > 1e6).item()):
            x = x / 1e6
        return x


class Choosing(nn.Module):
    """Blocks that choose, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Choice() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Picky(nn.Module):
    """Checks what it is given, and takes more if it gets it."""

    def forward(
        self, x: torch.Tensor, extra: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        assert float(x.abs().max()) < 100, "too large"
        y = x * 2
        return {"y": y if extra is None else y + extra, "odd": y.to(torch.float8_e4m3fn)}


def picky() -> nn.Module:
    """No weights at all."""
    return Picky().eval()


def _drawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator)
                tensor.copy_((drawn - 0.3) * (3 / max(tensor[0].numel(), 1) ** 0.5))
        for each in module.modules():
            if isinstance(each, nn.BatchNorm2d) and each.running_var is not None:
                each.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def residual_mlp() -> nn.Module:
    """Six blocks."""
    return _drawn(ResidualMlp())


def unet() -> nn.Module:
    """Two outputs."""
    return _drawn(UNet())


def choosing() -> nn.Module:
    """Looks at its numbers."""
    return _drawn(Choosing())


def choice() -> nn.Module:
    """One block, which cannot be cut."""
    return _drawn(Choice())


def broken() -> nn.Module:
    """A factory that fails."""
    raise RuntimeError("no weights today")


def no_module() -> int:
    """A factory that gives something else."""
    return 3
