"""scikit-learn's handwritten digits: read, split, varied."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import affine_grid, grid_sample

NUM_CLASSES = 10
HELD_OUT = 0.2
ROTATION = 0.26  # radians
SHIFT = 0.2  # of half the image: 0.8 pixels
STRETCH = 0.12


@dataclass(frozen=True)
class Digits:
    """Images [num, 8, 8] as an image file has them, 0 (paper) to 255 (ink), and what they show."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read_digits(seed: int) -> tuple[Digits, Digits]:
    """The training part, and the part held out: of each digit a fifth, drawn by the seed."""
    raw = load_digits()
    images = torch.from_numpy(np.rint(raw.images * (255 / 16)).astype(np.uint8))
    labels = torch.from_numpy(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(NUM_CLASSES):
        of_digit = order[labels[order] == digit]
        held[of_digit[: round(len(of_digit) * HELD_OUT)]] = True
    return Digits(images[~held], labels[~held]), Digits(images[held], labels[held])


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """As the folder's image processor has them: [num, 3, 8, 8] from -1 to 1, channels alike."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def vary(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turned, shifted and stretched a little; half of them dark on light. [num, 3, 8, 8]."""

    def draw(limit: float, *shape: int) -> torch.Tensor:
        return (torch.rand(len(pixels), *shape, generator=generator) * 2 - 1) * limit

    angle, stretch = draw(ROTATION), 1 + draw(STRETCH, 2)
    rows = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(-1, 2, 2)
    places = torch.cat((rows * stretch[:, :, None], draw(SHIFT, 2, 1)), 2)
    grid = affine_grid(places, list(pixels.shape), align_corners=False)
    # Outside of an image is paper, -1; grid_sample puts 0 there.
    moved = grid_sample(pixels + 1, grid, align_corners=False) - 1
    sign = torch.where(draw(1.0) < 0, -1.0, 1.0)
    return moved * sign[:, None, None, None]
