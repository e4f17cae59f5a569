"""The optimiser and its learning rate."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(
    model: nn.Module, peak: float, num_steps: int, weight_decay: float
) -> tuple[AdamW, LambdaLR]:
    """AdamW that decays matrices only; the rate rises for a twentieth, then falls as a cosine."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=peak, betas=(0.9, 0.98))
    rise = max(1, num_steps // 20)

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, num_steps - rise))

    return optimizer, LambdaLR(optimizer, rate)
