"""The KL autoencoder of Stable Video Diffusion: that of pictures, with a decoder whose every block also mixes frames.

Source: Blattmann et al. 2023b (arXiv 2311.15127), app. D; sgm/modules/autoencoding/temporal_ae.py. Names of parameters
are those of diffusers' `AutoencoderKLTemporalDecoder`, so that its files load without renaming.

`decode` here is the plain pass, for training and as the reference. Drawing uses `framed.py`: the same network in a
fraction of the memory.
"""

from __future__ import annotations

from torch import Tensor, nn

from sfumato.autoencoder.kl import EPS as SPATIAL_EPS
from sfumato.autoencoder.kl import (
    Attention,
    AutoencoderKL,
    KLConfig,
    Resnet,
    Upsample,
    norm_silu,
    to_frames,
)
from sfumato.autoencoder.model import PIXEL_CHANNELS, from_frames
from sfumato.nn.temporal import Mixer, TemporalConv, TemporalResnet, as_clips, as_frames

EPS = 1e-5  # of the GroupNorms over clips; those over pictures have kl.EPS


class SpaceTimeResnet(nn.Module):
    """A residual block of frames, then one of clips, by its share."""

    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.spatial_res_block = Resnet(channels, out, groups)
        self.temporal_res_block = TemporalResnet(out, 0, groups, EPS)
        self.time_mixer = Mixer(0.0, of_space=False)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = self.spatial_res_block(x)  # (B·T, C, H, W) -> (B·T, C', H, W)
        return self.time_mixer(x, self.temporal_res_block(x, frames))


class MidBlock(nn.Module):
    """Two blocks at the latent's resolution, with attention over the cells of a frame between them."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([SpaceTimeResnet(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def layers(self) -> list[nn.Module]:
        return [self.resnets[0], *self.attentions, self.resnets[1]]


class UpBlock(nn.Module):
    """The layers of one level of the decoder."""

    def __init__(self, channels: int, out: int, resnets: int, groups: int, grow: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            [SpaceTimeResnet(out if i else channels, out, groups) for i in range(resnets)]
        )
        self.upsamplers = nn.ModuleList([Upsample(out)] if grow else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.upsamplers]


class TemporalDecoder(nn.Module):
    """(B·T, C, H/f, W/f) → (B·T, 3, H, W) pixels, about [-1, 1] and not clamped."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths, groups = config.widths[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(widths[max(0, i - 1)], width, config.resnets + 1, groups, grow=i + 1 < len(widths))
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], SPATIAL_EPS)
        self.conv_out = nn.Conv2d(widths[-1], PIXEL_CHANNELS, 3, padding=1)
        self.time_conv_out = TemporalConv(PIXEL_CHANNELS, PIXEL_CHANNELS)

    def layers(self) -> list[nn.Module]:
        """Those between entrance and exit, in the order in which data meets them."""
        return [layer for block in (self.mid_block, *self.up_blocks) for layer in block.layers()]

    def forward(self, z: Tensor, frames: int) -> Tensor:
        x = self.conv_in(z)  # (B·T, D, H/f, W/f)
        for layer in self.layers():
            x = layer(x, frames) if isinstance(layer, SpaceTimeResnet) else layer(x)
        x = self.conv_out(norm_silu(self.conv_norm_out, x))  # (B·T, 3, H, W)
        return as_frames(self.time_conv_out(as_clips(x, frames)), *x.shape[-2:])


class TemporalAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` with this decoder: frames are encoded as pictures, and decoded with those around them."""

    decoder: TemporalDecoder  # type: ignore[assignment]

    def __init__(self, config: KLConfig):
        super().__init__(config)
        self.decoder = TemporalDecoder(config)

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) float32 of an unnormalised latent (B, C, T, H/f, W/f); not clamped."""
        self.check_latent(latent)
        z = to_frames(latent).to(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return from_frames(self.decoder(z, latent.shape[2]).float(), len(latent))


def build(config: KLConfig) -> AutoencoderKL:
    """The autoencoder of that shape, with fresh weights: of clips if the configuration says so."""
    return TemporalAutoencoderKL(config) if config.temporal else AutoencoderKL(config)
