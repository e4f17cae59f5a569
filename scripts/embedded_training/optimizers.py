"""What updates the weights: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal (Newton-Schulz, five steps).

    A tensor with three dimensions is a stack of matrices, which is how experts are stored.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @staticmethod
    def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        """The nearest orthogonal matrix, roughly."""
        tall = matrix.size(-2) > matrix.size(-1)
        x: torch.Tensor = matrix.mT if tall else matrix
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = self.orthogonal(param.grad.lerp(momentum, group["momentum"]))
                scale = 0.2 * math.sqrt(max(param.shape[-2:]))  # as large as an update of Adam
                param.mul_(1 - group["lr"] * group["decay"])
                param.add_(update, alpha=-group["lr"] * scale)


def build_optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and routers."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, param in model.named_parameters():
        inner = param.ndim >= 2 and "embed" not in name and not name.endswith("mlp.gate.weight")
        (matrices if inner else others).append(param)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    return [Muon(matrices, lr=lr), adam]
