"""Optimisers and the average of the weights: torch's own, chosen per parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.train.muon import Muon
from sfumato.train.recipe import TrainRecipe


def make_optimizers(module: nn.Module, recipe: TrainRecipe) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of `blocks` and AdamW for the rest (2510.19376).

    Weight decay acts on matrices and convolutions only; gains, biases and embeddings are left alone.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    hidden = [
        p for name, p in named if recipe.optimizer == "muon" and p.ndim == 2 and ".blocks." in f".{name}"
    ]
    chosen = {id(p) for p in hidden}
    rest = [(name, p) for name, p in named if id(p) not in chosen]
    decayed = [p for name, p in rest if p.ndim >= 2 and "embedding" not in name and "offsets" not in name]
    kept = {id(p) for p in decayed}
    plain = [p for _, p in rest if id(p) not in kept]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas, fused=True)
    ]
    if hidden:
        optimizers.append(Muon(hidden, lr=recipe.muon_lr, weight_decay=recipe.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def rate_at(step: int, recipe: TrainRecipe) -> float:
    """Share of the peak rate at `step` (from 1): linear rise, plateau, linear fall to zero at the end."""
    rise = min(1.0, step / max(1, recipe.warmup))
    fall = recipe.steps * recipe.decay
    return rise * min(1.0, (recipe.steps - step + 1) / fall) if fall else rise


def set_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


class Average:
    """Exponential moving average of a module's floating-point state, each tensor in its own type.

    The decay at step n is min(decay, (1 + n) / (10 + n)), so that the first steps do not weigh for ever.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        current = module.state_dict()
        averaged = [name for name, value in self.state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.state[n] for n in averaged], [current[n].detach() for n in averaged], share
        )


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All state of the optimisers as named tensors; their rates and settings come from the recipe."""
    tensors = {}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{number}/{index}/{key}"] = torch.as_tensor(value)
    return tensors


def restore_optimizers(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Moments get the memory layout of their weights: fused kernels rely on it."""
    for number, optimizer in enumerate(optimizers):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        whole = optimizer.state_dict()
        whole["state"] = {}
        for name, value in tensors.items():
            owner, index, key = name.split("/")
            if int(owner) == number:
                whole["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(whole)
        for weight in weights:
            for key, value in optimizer.state[weight].items():
                if value.shape == weight.shape:
                    optimizer.state[weight][key] = torch.empty_like(weight).copy_(value)
