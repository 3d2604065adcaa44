"""One training step of an adapter beside a frozen model, on cached latents: the same loss as of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.data.buckets import Order
from sfumato.data.latents import LatentCache
from sfumato.data.source import Size, Source
from sfumato.diffusion.loss import flow_density, prediction_loss, spread, table_density, training_pair
from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.path import FLOW
from sfumato.diffusion.schedules import NoiseLevels
from sfumato.flops import count_flops
from sfumato.train.loop import Loss, seeded
from sfumato.train.recipe import LoraLoss, TrainRecipe
from sfumato.types import Conditioning

Told = Callable[[tuple[str, ...]], Conditioning]  # captions to rows of features
Call = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """What of a model the step needs. told: features of captions, from a cache or, with gradients, from encoders that
    are trained. sized, predict, parameterization, levels: as of `families.trainee.Trainee`.
    """

    told: Told
    sized: Callable[[Conditioning, int, int], Conditioning]
    predict: Callable[[Tensor, Tensor, Conditioning], Tensor]
    parameterization: Parameterization
    levels: NoiseLevels


@dataclass(frozen=True)
class Batch:
    """Pictures of one size (height, width) in pixels. latents: (B, C, T, H, W). captions: as they are read, B of them.
    prior: pictures of the class, to be kept as the model draws them (DreamBooth, Ruiz et al. 2022, 2208.12242, eq. 2).
    """

    latents: Tensor
    captions: tuple[str, ...]
    size: Size
    prior: Batch | None = None

    def first(self) -> Batch:
        """Its first picture alone."""
        return Batch(self.latents[:1], self.captions[:1], self.size)


@dataclass(frozen=True)
class Pictures:
    """A source with its latents, and how its captions are read."""

    source: Source
    cache: LatentCache
    caption: Callable[[str], str] = str


class Examples:
    """Random access to microbatches: part p of step s, the same whenever it is asked for."""

    def __init__(
        self,
        own: Pictures,
        prior: Pictures | None,
        train: TrainRecipe,
        drop_prompt: float,
        seed: int,
        device: torch.device,
    ):
        self.own, self.prior, self.train, self.drop_prompt = own, prior, train, drop_prompt
        self.seed, self.device = seed, device
        self._orders = {
            name: Order(pictures.cache.buckets(), train.batch, seed)
            for name, pictures in (("own", own), ("prior", prior))
            if pictures is not None
        }

    def part(self, step: int, part: int) -> Batch:
        """Microbatch `part` of `step` (from 1), on the device."""
        own = self._pictures("own", self.own, step, part)
        if self.prior is None:
            return own
        return replace(own, prior=self._pictures("prior", self.prior, step, part))

    def _pictures(self, name: str, pictures: Pictures, step: int, part: int) -> Batch:
        order = self._orders[name]
        batch = order.batch_at(step - 1, part, self.train.parts)
        drawn = torch.rand(len(batch.indices), generator=seeded("cpu", self.seed, "prompt", name, step, part))
        captions = tuple(
            "" if drop else pictures.caption(pictures.source.caption(int(i), int(epoch)))
            for i, epoch, drop in zip(
                batch.indices, batch.epochs, (drawn < self.drop_prompt).tolist(), strict=True
            )
        )
        latents = pictures.cache.batch(batch.indices.tolist()).to(self.device)
        return Batch(latents, captions, order.bucket_at(step - 1))


def noise_levels(u: Tensor, levels: NoiseLevels, loss: LoraLoss) -> Tensor:
    """(B,) float64 noise levels of uniform draws u: the steps of a model's own table, or on FLOW by the density."""
    if levels.path is not FLOW:
        return table_density(levels)(u.double())
    return flow_density(loss.density, loss.mean, loss.std, loss.shift or levels.shift)(u.double())


def adapter_loss(
    net: Call, batch: Batch, subject: Subject, loss: LoraLoss, generator: torch.Generator
) -> Loss:
    """Mean loss of a microbatch and its terms: `diffusion` of the own pictures and, where there are any, `prior`.

    net(call, *args) runs the frozen model with the adapter. Chance (noise, noise levels) comes from `generator` alone.
    """
    diffusion = net(denoising_error, batch, subject, loss, generator).mean()
    if batch.prior is None:
        return diffusion, {"loss": diffusion}
    prior = net(denoising_error, batch.prior, subject, loss, generator).mean()
    total = diffusion + loss.prior_weight * prior
    return total, {"loss": total, "diffusion": diffusion, "prior": prior}


def denoising_error(batch: Batch, subject: Subject, loss: LoraLoss, generator: torch.Generator) -> Tensor:
    """(B,) weighted squared errors of the network's prediction."""
    x0 = batch.latents
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    u = spread(torch.rand(len(x0), generator=generator))
    sigma = noise_levels(u, subject.levels, loss).to(x0.device)
    pair = training_pair(x0, noise, sigma, subject.parameterization, loss.weighting, loss.gamma)
    cond = subject.sized(subject.told(batch.captions), *batch.size)
    return prediction_loss(subject.predict(pair.x, pair.time, cond), pair)


@torch.no_grad()
def held_out_error(
    net: Call,
    pictures: Pictures,
    subject: Subject,
    loss: LoraLoss,
    seed: int,
    batch: int,
    rounds: int,
    device: torch.device,
) -> float:
    """Mean unweighted error over all pictures, `rounds` times with other noise; the same noise whoever is measured."""
    plain, total, count = replace(loss, weighting="plain"), 0.0, 0
    for number in range(rounds):
        for size, members in pictures.cache.buckets().items():
            for start in range(0, len(members), batch):
                some = members[start : start + batch]
                captions = tuple(pictures.caption(pictures.source.caption(i, 0)) for i in some)
                generator = seeded("cpu", seed, "held out", number, *size, start)
                one = Batch(pictures.cache.batch(some).to(device), captions, size)
                total += float(net(denoising_error, one, subject, plain, generator).sum())
                count += len(some)
    return total / count


def picture_flops(net: Call, batch: Batch, subject: Subject, loss: LoraLoss) -> float:
    """FLOPs of one picture of `batch`, forward and backward. The gradients are the caller's to clear."""
    one = batch.first()

    def there_and_back() -> None:
        adapter_loss(net, one, subject, loss, seeded("cpu", 0))[0].backward()

    return float(count_flops(there_and_back))
