"""A convolutional KL autoencoder for any factor 1 … 32; factor 1 is the identity through the same interface.

The plan follows what a small CPU is good at. Matrix units make convolutions nearly free, while every pass
over a large activation costs memory traffic; so the stem folds pixels into channels at once (space to depth),
norms act on the channels of one position, and nothing wide happens at full resolution. Down- and upsampling
carry the parameter-free space-to-channel shortcuts of DC-AE (Chen et al. 2024, arXiv 2410.10733, sec. 3.2),
which keep deep factors trainable.

No layer looks further than its convolution's window, and none mixes positions otherwise (no attention, no
GroupNorm), so the decoder has a finite receptive field and a picture decoded in overlapping tiles is the
picture decoded whole. Frames are independent: T pictures of a clip are T pictures of a batch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato import checks
from sfumato.errors import InputError

FACTORS = (1, 2, 4, 8, 16, 32)
LOGVAR_RANGE = (-30.0, 20.0)  # LDM's clamp (ldm/modules/distributions): exp(logvar) stays finite
PIXEL_CHANNELS = 3


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder. Widths are channels; strides are pixels per cell side."""

    factor: int = 16  # pixels per side of a latent cell; 1 is the identity
    latent_channels: int = 16  # of a latent cell; f16c16 holds as many numbers as f8c4. At factor 1 it is 3
    encoder_width: int = 64  # channels at stride 4, doubled at each coarser stride, halved at stride 2
    decoder_width: int = 64  # the same for the decoder, which is larger by its blocks and its finer head
    max_width: int = 192  # channels at most: the coarsest convolutions hold most of the weights
    encoder_blocks: int = 1  # residual blocks per stride
    decoder_blocks: int = 2  # residual blocks per stride, one at stride 2: it invents what the latent lost
    stem: int = 4  # pixels per side folded into channels before the first convolution, at most `factor`
    head: int = 2  # pixels per side unfolded from channels after the last convolution, at most `factor`

    def __post_init__(self) -> None:
        if self.factor not in FACTORS:
            raise InputError(f"factor must be one of {FACTORS}, not {self.factor!r}", argument="factor")
        for f in fields(self):
            checks.whole(f.name, getattr(self, f.name), 1)
        for name in ("stem", "head"):
            if getattr(self, name) not in FACTORS:
                raise InputError(f"{name} must be one of {FACTORS}, not {getattr(self, name)}", argument=name)
        for name in ("encoder_width", "decoder_width", "max_width"):
            if getattr(self, name) % 32:
                raise InputError(
                    f"{name} must be a multiple of 32, the matrix units' grain, not {getattr(self, name)}",
                    argument=name,
                )

    @property
    def channels(self) -> int:
        """Channels of a latent: `latent_channels`, or 3 at factor 1."""
        return PIXEL_CHANNELS if self.factor == 1 else self.latent_channels

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AutoencoderConfig:
        """Build from plain values; an unknown field is an `InputError` that lists the known ones."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(
                    f"unknown autoencoder field {name!r}; known are {', '.join(known)}", argument=name
                )
        return cls(**values)

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    def strides(self, finest: int) -> list[int]:
        """Strides from min(finest, factor) to factor, in powers of two."""
        first = min(finest, self.factor)
        return [first << i for i in range(int(math.log2(self.factor // first)) + 1)]

    def width(self, base: int, stride: int) -> int:
        """Channels at a stride: `base` at stride 4, proportional to the stride, from 16 to `max_width`."""
        return min(self.max_width, max(16, base * stride // 4))


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents. mean, logvar: (B, C, T, H, W) float32; logvar lies in [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise; the caller draws `noise` (standard normal, the mean's shape), so that it can be
        repeated.
        """
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal in nats for each latent number, the mean's shape (VAE,
        1312.6114, app. B).
        """
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)


class Reconstruction(NamedTuple):
    """What a training step needs: pixels (B, 3, T, H, W), the posterior, and the picture of the downscaled
    latent.
    """

    pixels: Tensor
    posterior: Posterior
    small: Tensor | None  # (B', 3, T, H/s, W/s)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position; in channels-last memory that is one contiguous pass."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))): one norm and one activation between two 3×3 convolutions, the last one
    starting at 0.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class Downsample(nn.Module):
    """Halve height and width: a stride-2 convolution beside the mean of space-to-channel groups (DC-AE, fig.
    4).
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride=2, padding=1)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + regroup_channels(
            F.pixel_unshuffle(x, 2), self.out
        )  # (B, C, H, W) -> (B, C', H/2, W/2)


class Upsample(nn.Module):
    """Double height and width: convolution and channel-to-space beside a repeated channel-to-space (DC-AE,
    fig. 4).
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * out, 3, padding=1)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + regroup_channels(x, 4 * self.out)  # (B, C, H, W) -> (B, 4C', H, W)
        return F.pixel_shuffle(x, 2)  # (B, C', 2H, 2W)


def regroup_channels(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) -> (B, C', H, W): the mean of neighbouring channels, or each several times in a row, or
    both by the gcd.
    """
    common = math.gcd(x.shape[1], channels)
    x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    if channels > common:
        x = x.repeat_interleave(channels // common, -1)
    if x.shape[-1] > channels:
        x = x.unflatten(-1, (channels, -1)).mean(-1)
    return x.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """(B, 3, H, W) pixels in [-1, 1] -> (B, 2C, H/f, W/f): mean and logvar."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        strides = config.strides(config.stem)
        widths = [config.width(config.encoder_width, stride) for stride in strides]
        self.fold = strides[0]
        self.stem = nn.Conv2d(PIXEL_CHANNELS * self.fold**2, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level:
                layers.append(Downsample(widths[level - 1], width))
            layers += [ResidualBlock(width) for _ in range(config.encoder_blocks)]
        self.body = nn.Sequential(*layers)
        self.norm = ChannelNorm(widths[-1])
        self.out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(x, self.fold))  # (B, D, H/stem, W/stem)
        return self.out(F.silu(self.norm(self.body(x))))  # (B, 2C, H/f, W/f)


class Decoder(nn.Module):
    """(B, C, H/f, W/f) -> (B, 3, H, W) pixels, about [-1, 1] (not clamped, so that gradients reach outliers)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        strides = config.strides(config.head)[::-1]
        widths = [config.width(config.decoder_width, stride) for stride in strides]
        self.unfold = strides[-1]
        self.stem = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level:
                layers.append(Upsample(widths[level - 1], width))
            blocks = config.decoder_blocks if strides[level] > 2 or len(strides) == 1 else 1
            layers += [ResidualBlock(width) for _ in range(blocks)]
        self.body = nn.Sequential(*layers)
        self.norm = ChannelNorm(widths[-1])
        self.out = nn.Conv2d(widths[-1], PIXEL_CHANNELS * self.unfold**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.body(self.stem(z))  # (B, D, H/head, W/head)
        return F.pixel_shuffle(self.out(F.silu(self.norm(x))), self.unfold)  # (B, 3, H, W)


class Autoencoder(nn.Module):
    """Pixels (B, 3, T, H, W) in [-1, 1] <-> latents (B, C, T, H/f, W/f).

    `latent_mean` and `latent_std` (C,) are measured on the training data after training and travel with the
    weights; a diffusion model sees normalised latents only.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.register_buffer("latent_mean", torch.zeros(config.channels))
        self.register_buffer("latent_std", torch.ones(config.channels))
        self.encoder = Encoder(config) if config.factor > 1 else None
        self.decoder = Decoder(config) if config.factor > 1 else None
        self.reset_parameters()
        self.to(memory_format=torch.channels_last)

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, whose gradients balance the adversarial loss."""
        if self.decoder is None:
            raise InputError("factor 1 is the identity and has nothing to train", argument="factor")
        return self.decoder.out.weight

    def reset_parameters(self) -> None:
        """Residual branches start at zero; sub-pixel convolutions start equal for all pixels of a cell (ICNR,
        1707.02937).
        """
        if self.latent_mean.is_meta:  # the weights are about to be read from a file
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Upsample):
                icnr_(module.conv.weight, 4)
            elif isinstance(module, Decoder):
                icnr_(module.out.weight, module.unfold**2)
            elif isinstance(module, Encoder):
                with torch.no_grad():  # logvar about -6, a std of 0.05: nearly deterministic at first
                    module.out.weight[self.config.latent_channels :] *= 0.1
                if module.out.bias is not None:
                    nn.init.constant_(module.out.bias[self.config.latent_channels :], -6.0)

    def encode(self, pixels: Tensor) -> Posterior:
        """Posterior over latents; at factor 1 its mean is `pixels` and its variance nil. `InputError` on a
        wrong shape or size.
        """
        self.check(pixels)
        if self.encoder is None:
            return Posterior(pixels, torch.full_like(pixels, LOGVAR_RANGE[0]))
        batch = pixels.shape[0]
        moments = self.encoder(to_frames(pixels)).float()  # (B·T, 2C, H/f, W/f)
        mean, logvar = from_frames(moments, batch).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) float32 of an unnormalised latent (B, C, T, H/f, W/f); not clamped."""
        if latent.ndim != 5 or latent.shape[1] != self.config.channels:
            raise InputError(
                f"a latent must have shape (B, {self.config.channels}, T, H, W), not {tuple(latent.shape)}",
                argument="latent",
            )
        if self.decoder is None:
            return latent
        return from_frames(self.decoder(to_frames(latent)).float(), latent.shape[0])

    def forward(
        self, pixels: Tensor, noise: Tensor | None = None, shrink: int = 1, share: float = 1.0
    ) -> Reconstruction:
        """Encode and decode. `noise` (standard normal, the latent's shape) samples the posterior; None takes its mean.

        With shrink s > 1 the first ceil(share · B) latents are also averaged over s×s cells and decoded,
        which the scale-equivariance loss compares with equally shrunk pictures.
        """
        posterior = self.encode(pixels)
        latent = posterior.mode() if noise is None else posterior.sample(noise)
        small = None
        if shrink > 1:
            small = self.decode(shrink_planes(latent[: math.ceil(share * len(latent))], shrink))
        return Reconstruction(self.decode(latent), posterior, small)

    def normalize(self, latent: Tensor) -> Tensor:
        """(latent − mean) / std per channel."""
        return (latent - per_channel(self.latent_mean, latent)) / per_channel(self.latent_std, latent)

    def denormalize(self, latent: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return latent * per_channel(self.latent_std, latent) + per_channel(self.latent_mean, latent)

    def encode_normalized(self, pixels: Tensor) -> Tensor:
        """The posterior mean, normalised: what a denoiser trains on."""
        return self.normalize(self.encode(pixels).mode())

    def decode_normalized(self, latent: Tensor) -> Tensor:
        """Pixels of a normalised latent: what a sampler returns."""
        return self.decode(self.denormalize(latent))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the latents' per-channel mean and standard deviation, each (C,), finite, std > 0."""
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.latent_mean.shape or not torch.isfinite(value).all():
                raise InputError(
                    f"latent {name} must be {self.config.channels} finite numbers", argument=name
                )
        if (std <= 0).any():
            raise InputError(
                "latent std must be positive; a channel that never varies carries nothing", argument="std"
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H/f, W/f) for pixels of T frames, H × W. `InputError` names the nearest legal size."""
        check_size(self.factor, height, width)
        return self.config.channels, frames, height // self.factor, width // self.factor

    def check(self, pixels: Tensor) -> None:
        if pixels.ndim != 5 or pixels.shape[1] != PIXEL_CHANNELS:
            raise InputError(
                f"pixels must have shape (B, 3, T, H, W), not {tuple(pixels.shape)}", argument="pixels"
            )
        check_size(self.factor, *pixels.shape[-2:])


def check_size(factor: int, height: int, width: int) -> None:
    """Raise `InputError` with the nearest legal size unless both sides are positive multiples of `factor`."""
    if height % factor or width % factor or min(height, width) < 1:
        nearest = [max(1, math.floor(side / factor + 0.5)) * factor for side in (width, height)]
        raise InputError(
            f"size {width}x{height} does not divide into cells of {factor} pixels; the nearest legal size is "
            f"{nearest[0]}x{nearest[1]}",
            argument="size",
        )


def shrink_planes(x: Tensor, scale: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T, H/s, W/s), means of s×s cells; for pixels and latents alike."""
    return F.avg_pool3d(x, (1, scale, scale))


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, 1, 1, 1)


def to_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B·T, C, H, W) in channels-last memory."""
    return x.movedim(2, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def from_frames(x: Tensor, batch: int) -> Tensor:
    """(B·T, C, H, W) -> (B, C, T, H, W)."""
    return x.unflatten(0, (batch, -1)).movedim(1, 2)


def icnr_(weight: Tensor, pixels: int) -> None:
    """Make the `pixels` filters of each output channel equal, so that the pixel shuffle starts without a
    checkerboard.
    """
    with torch.no_grad():
        weight.copy_(weight[::pixels].repeat_interleave(pixels, 0))
