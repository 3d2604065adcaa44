"""One training step of the denoiser and its text encoder, on cached latents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.data.buckets import Order
from sfumato.data.latents import LatentCache
from sfumato.data.source import Source
from sfumato.diffusion.loss import flow_density, prediction_loss, spread, training_pair
from sfumato.diffusion.parameterization import Parameterization
from sfumato.errors import InputError
from sfumato.flops import count_flops
from sfumato.text import Tokenizer, pad
from sfumato.train.loop import Loss, Player, seeded
from sfumato.train.recipe import DenoiserLoss, DenoiserRecipe

TEXT_MULTIPLE = 16  # prompts are padded to multiples of this many tokens, so that few shapes are compiled


@dataclass(frozen=True)
class Batch:
    """One microbatch. latents: (B, C, T, H, W); ids, mask: (B, N); labels: (B, A, H, W) int64 or None."""

    latents: Tensor
    ids: Tensor
    mask: Tensor
    labels: Tensor | None

    def first(self) -> Batch:
        """Its first picture alone."""
        labels = None if self.labels is None else self.labels[:1]
        return Batch(self.latents[:1], self.ids[:1], self.mask[:1], labels)


class Examples:
    """Random access to microbatches: part p of step s, the same whenever it is asked for.

    A step's pictures are dealt to its parts by the length of their prompts, so that short ones are not padded to the
    longest of all; the step's gradient is the same sum.
    """

    def __init__(
        self,
        source: Source,
        cache: LatentCache,
        tokenizer: Tokenizer,
        recipe: DenoiserRecipe,
        seed: int,
        device: torch.device,
        labels: Tensor | None = None,
    ):
        self.source, self.cache, self.tokenizer, self.recipe = source, cache, tokenizer, recipe
        self.seed, self.device, self.labels = seed, device, labels
        self.order = Order(cache.buckets(), recipe.train.batch, seed)
        self._dealt = functools.lru_cache(maxsize=2)(self._deal)

    def part(self, step: int, part: int) -> Batch:
        """Microbatch `part` of `step` (from 1), on the device."""
        size = self.recipe.train.batch // self.recipe.train.parts
        chosen = self._dealt(step)[part * size : (part + 1) * size]
        indices = [index for index, _ in chosen]
        ids, mask = pad([tokens for _, tokens in chosen], TEXT_MULTIPLE)
        labels = None if self.labels is None else self.labels[indices].long().to(self.device)
        latents = self.cache.batch(indices)
        return Batch(latents.to(self.device), ids.to(self.device), mask.to(self.device), labels)

    def _deal(self, step: int) -> list[tuple[int, list[int]]]:
        """(picture, prompt's tokens) of the whole step, short prompts first."""
        batch = self.order.batch_at(step - 1)
        generator = seeded("cpu", self.seed, "prompt", step)
        dropped = torch.rand(len(batch.indices), generator=generator) < self.recipe.loss.drop_prompt
        rows = [
            (int(i), self.tokenizer.encode("" if drop else self.source.caption(int(i), int(epoch))))
            for i, epoch, drop in zip(batch.indices, batch.epochs, dropped.tolist(), strict=True)
        ]
        return sorted(rows, key=lambda row: len(row[1]))


def denoiser_loss(
    net: Callable[..., tuple[Tensor, Tensor | None]],
    batch: Batch,
    parameterization: Parameterization,
    recipe: DenoiserLoss,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a microbatch and its terms: `diffusion` (weighted squared error) and, with labels, `labels`.

    Chance (noise levels, noise) comes from `generator` alone.
    """
    x0 = batch.latents
    noise = torch.randn(x0.shape, generator=generator, device=generator.device).to(x0.device)
    u = spread(torch.rand(len(x0), generator=generator, device=generator.device))
    # pictures come in the order of their prompts' lengths, which must not say how noisy they get
    u = u[torch.randperm(len(x0), generator=generator, device=generator.device)].to(x0.device)
    sigma = flow_density(recipe.density, recipe.mean, recipe.std, recipe.shift)(u)
    pair = training_pair(x0, noise, sigma, parameterization, recipe.weighting)
    prediction, logits = net(pair.x, pair.time, batch.ids, batch.mask)
    diffusion = prediction_loss(prediction, pair).mean()
    loss, terms = diffusion, {"diffusion": diffusion}
    if batch.labels is not None and logits is not None and recipe.labels:
        terms["labels"] = label_loss(logits.float(), batch.labels)
        loss = loss + recipe.labels * terms["labels"]
    elif logits is not None:  # processes that share gradients expect one of every weight
        loss = loss + 0.0 * logits.sum()
    return loss, {"loss": loss, **terms}


def picture_flops(
    network: nn.Module, batch: Batch, parameterization: Parameterization, recipe: DenoiserLoss
) -> float:
    """FLOPs of one picture of `batch`, forward and backward. The network's gradients are cleared."""
    one = batch.first()

    def there_and_back() -> None:
        denoiser_loss(network, one, parameterization, recipe, seeded("cpu", 0))[0].backward()

    counted = count_flops(there_and_back)
    network.zero_grad(set_to_none=True)
    return float(counted)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over attributes and cells. logits: (B, N, Σ classes); labels: (B, A, H, W).

    Exact per-cell labels of a made world stand in for the features of a pretrained network (REPA, 2410.06940).
    """
    B, A = labels.shape[:2]
    targets = labels.view(B, A, -1)
    sizes = label_sizes(logits.shape[-1])
    total = logits.new_zeros(())
    for a, part in enumerate(logits.split(sizes, dim=-1)):
        total = total + functional.cross_entropy(part.flatten(0, 1), targets[:, a].flatten())
    return total / A


def label_sizes(total: int) -> list[int]:
    """Classes of each attribute of a scene's cells, background included; `total` must be their sum."""
    from sfumato.scenes.labels import ATTRIBUTES

    sizes = [1 + len(words) for _, words in ATTRIBUTES]
    if sum(sizes) != total:
        raise InputError(f"a label head of {total} classes does not fit the cells' {sizes}")
    return sizes


def denoiser_player(
    network: nn.Module,
    examples: Examples,
    parameterization: Parameterization,
    recipe: DenoiserRecipe,
    seed: int,
) -> Player:
    """The denoiser as the loop knows it."""

    def loss(net: nn.Module, batch: Batch, step: int, part: int) -> Loss:
        return denoiser_loss(
            net, batch, parameterization, recipe.loss, seeded("cpu", seed, "noise", step, part)
        )

    return Player("denoiser", network, recipe.train, examples.part, loss, apart=True)
