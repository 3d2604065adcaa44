"""Muon with matrices of one shape orthogonalised together: the same update as torch's, in fewer and larger calls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato.runtime import fast_dtype


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the learning rate of `adjust_lr_fn="match_rms_adamw"`, up to rounding.

    Torch's steps from matrix to matrix, and spends a third of its time on calls too small for the machine. A stack of
    a transformer's like matrices fills it. State, and so checkpoints, are torch's.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(weight.shape, []).append(weight)
            for shape, weights in alike.items():
                grads = [weight.grad for weight in weights]
                moments = [self._moment(weight) for weight in weights]
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, moments, group["momentum"])  # Nesterov's
                updates = orthogonalised(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"])
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
                torch._foreach_add_(weights, updates.float().unbind(), alpha=-rate)

    def _moment(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7
) -> Tensor:
    """(K, m, n) → (K, m, n), in the type that the machine multiplies fastest: each matrix with its singular values
    brought near 1.

    The quintic iteration X ← (a + b·XXᵀ + c·(XXᵀ)²) X of Jordan et al. 2024, on the shorter side.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)).to(
        fast_dtype(matrices.device), memory_format=torch.contiguous_format
    )
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = (gram @ gram).mul_(c).add_(gram, alpha=b)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        x = polynomial @ x
    return x.mT if tall else x
