"""One training step of the autoencoder and of its discriminator, and the statistics of the finished latents.

These are functions of (weights, pixels, generator, step) and nothing else: the same four give the same loss
to the bit. The loop owns optimisers, precision, averaging and saving.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from sfumato.autoencoder.discriminator import Discriminator
from sfumato.autoencoder.losses import (
    LossConfig,
    adaptive_weight,
    equivariance_loss,
    hinge_discriminator,
    hinge_generator,
    kl_loss,
    picture_loss,
)
from sfumato.autoencoder.model import Autoencoder, AutoencoderConfig
from sfumato.errors import InputError
from sfumato.flops import count_flops


def autoencoder_loss(
    model: nn.Module,
    pixels: Tensor,
    config: LossConfig,
    generator: torch.Generator,
    step: int,
    discriminator: Discriminator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss to minimise for the autoencoder, and its unweighted terms as detached scalars.

    model: an `Autoencoder`, bare or wrapped (DDP, compile). pixels: (B, 3, T, H, W) in [-1, 1]. generator:
    the only source of chance (posterior noise, equivariance scale), on any device. step: counts from 1; the
    adversarial term joins at `config.adversarial_start` if a discriminator is given. The discriminator's own
    gradients are left untouched.
    """
    inner = unwrapped(model)
    noise = latent_noise(inner, pixels, generator)
    shrink = draw_shrink(noise.shape[-2:], config, generator) if config.equivariance else 1
    out = model(pixels, noise, shrink, config.equivariance_share)
    picture, terms = picture_loss(out.pixels, pixels, config)
    terms["kl"] = kl_loss(out.posterior, pixels)
    loss = picture + config.kl * terms["kl"]
    if out.small is not None:
        terms["equivariance"] = equivariance_loss(out.small, pixels, config)
        loss = loss + config.equivariance * terms["equivariance"]
    if discriminator is not None and config.adversarial and step >= config.adversarial_start:
        with frozen(discriminator):
            terms["adversarial"] = hinge_generator(discriminator(out.pixels))
        weight = adaptive_weight(picture, terms["adversarial"], inner.last_layer, config.adversarial_limit)
        terms["adaptive_weight"] = weight
        loss = loss + config.adversarial * weight * terms["adversarial"]
    terms["psnr"] = -10 * torch.log10((out.pixels - pixels).square().mean() / 4)
    return loss, {"loss": loss.detach()} | {name: value.detach() for name, value in terms.items()}


def discriminator_loss(
    model: nn.Module,
    discriminator: nn.Module,
    pixels: Tensor,
    config: LossConfig,
    generator: torch.Generator,
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hinge loss of the discriminator on pictures and their reconstructions; 0 times it before
    `config.adversarial_start`.
    """
    inner = unwrapped(model)
    with torch.no_grad():
        fake = inner(pixels, latent_noise(inner, pixels, generator)).pixels
    judged = discriminator(torch.cat([pixels, fake]))
    real, fake_logits = judged.chunk(2)
    loss = hinge_discriminator(real, fake_logits) * float(step >= config.adversarial_start)
    return loss, {
        "discriminator": loss.detach(),
        "logits_real": real.detach().mean(),
        "logits_fake": fake_logits.detach().mean(),
    }


def step_flops(config: AutoencoderConfig, losses: LossConfig, shape: tuple[int, int, int]) -> float:
    """FLOPs of one picture's share of a step, forward and backward, averaged over the scales that the loss may draw.

    shape: pictures in a microbatch, height and width in pixels. Counted on tensors without numbers: any size costs
    nothing. The discriminator's are not among them.
    """
    with torch.device("meta"):
        model = Autoencoder(config)
        pixels = torch.empty(shape[0], 3, 1, *shape[1:])
    cells = model.latent_shape(1, *shape[1:])[-2:]
    scales = legal_scales(cells, losses) if losses.equivariance else []
    each = [replace(losses, equivariance_scales=(scale,)) for scale in scales] or [losses]

    def steps() -> None:
        for one in each:
            autoencoder_loss(model, pixels, one, torch.Generator(), 1)[0].backward()

    return count_flops(steps) / (len(each) * shape[0])


@torch.no_grad()
def latent_statistics(model: Autoencoder, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of the posterior means of all `batches` of pixels (B, 3, T, H, W).

    Streams in float64 by Chan's pairwise update, so that the order of magnitude of the mean costs no digits.
    `InputError` when there are fewer than two latent cells.
    """
    count, mean, spread = 0, None, None
    for pixels in batches:
        latent = model.encode(pixels).mode().double().movedim(1, 0).flatten(1)  # (C, B·T·H·W)
        size = latent.shape[1]
        batch_mean = latent.mean(1)
        batch_spread = (latent - batch_mean[:, None]).square().sum(1)
        if mean is None or spread is None:
            count, mean, spread = size, batch_mean, batch_spread
            continue
        delta = batch_mean - mean
        spread = spread + batch_spread + delta.square() * (count * size / (count + size))
        mean = mean + delta * (size / (count + size))
        count += size
    if mean is None or spread is None or count < 2:
        raise InputError(
            "latent statistics need at least two latent cells; give some pictures", argument="batches"
        )
    return mean.float(), (spread / count).sqrt().float()


def latent_noise(model: Autoencoder, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normals of the shape of the latents of `pixels`, on their device, drawn where the generator lives."""
    shape = (len(pixels), *model.latent_shape(*pixels.shape[2:]))
    return torch.randn(shape, generator=generator, device=generator.device).to(pixels.device)


def legal_scales(cells: tuple[int, ...], config: LossConfig) -> list[int]:
    """Those of the scales by which the latent divides."""
    return [s for s in config.equivariance_scales if all(n % s == 0 and n >= s for n in cells)]


def draw_shrink(cells: tuple[int, ...], config: LossConfig, generator: torch.Generator) -> int:
    """One of the scales by which the latent divides, drawn evenly; 1 (no such loss) when none does."""
    legal = legal_scales(cells, config)
    if not legal:
        return 1
    return legal[int(torch.randint(len(legal), (), generator=generator, device=generator.device))]


def unwrapped(model: nn.Module) -> Autoencoder:
    """The `Autoencoder` inside DDP or torch.compile wrappers."""
    while not isinstance(model, Autoencoder):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise InputError(f"an Autoencoder was expected, not {type(model).__name__}", argument="model")
        model = inner
    return model


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it a module's parameters gather no gradients, while gradients still flow through it to its input."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
