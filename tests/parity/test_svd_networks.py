"""Stable Video Diffusion's networks against diffusers' and transformers' with the same weights.

Tiny random configurations always; the published sizes under `full`. There both networks share one set of tensors, so
that a test needs the weights' memory once.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers import relative_error
from sfumato.autoencoder import temporal
from sfumato.autoencoder.banded import encode_banded
from sfumato.autoencoder.framed import decode_framed
from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.fill import fill
from sfumato.families.published.folder import processor_config, vae_config, vision_config
from sfumato.families.svd.folder import unet_config
from sfumato.nn.packed import pack
from sfumato.nn.spacetime import SpaceTimeConfig, SpaceTimeUNet
from sfumato.text.vision import OPENCLIP_VIT_H, ClipVisionConfig, ClipVisionEncoder, antialiased

CLOSE = 1e-5  # ‖ours − theirs‖ / ‖theirs‖ in float32
UNET, VAE = "diffusers UNetSpatioTemporalConditionModel", "diffusers AutoencoderKLTemporalDecoder"
VISION = "transformers CLIPVisionModelWithProjection"
CLIP_VAE = KLConfig(temporal=True, use_post_quant_conv=False)

_SMALL = {"channels": (32, 64, 64, 64), "context": 24, "waves": 16}
TINY = {
    "svd": SpaceTimeConfig(**_SMALL, heads=(2, 4, 4, 4)),
    "two levels, the second without attention": SpaceTimeConfig(
        channels=(32, 64), depths=(1, 0), heads=(2, 4), context=24, waves=16
    ),
    "two blocks deep, three numbers more": SpaceTimeConfig(
        channels=(32, 64),
        depths=(2, 0),
        mid_depth=2,
        heads=(2, 4),
        context=24,
        waves=8,
        told=6,
        out_channels=6,
    ),
    "one block each": SpaceTimeConfig(**_SMALL, heads=(1, 2, 4, 4), resnets=1),
}


def shaken(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def pair(config: SpaceTimeConfig, assign: bool = False) -> tuple[SpaceTimeUNet, nn.Module]:
    """Ours and theirs with equal weights; with `assign` the same tensors."""
    torch.manual_seed(0)
    theirs = shaken(UNetSpatioTemporalConditionModel.from_config(unet_config(config, 8, 4)))
    with torch.device("meta" if assign else "cpu"):
        ours = SpaceTimeUNet(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=assign)
    return ours, theirs


def question(config: SpaceTimeConfig, B: int, T: int, H: int, W: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    told = torch.cat([torch.tensor([[6.0, 127.0, 0.02]]).repeat(B, 1), draw(B, 3).abs()], 1)[:, : config.told]
    return draw(B, config.in_channels, T, H, W), draw(B), draw(B, 1, config.context), told


def asked(theirs: nn.Module, x, time, context, told) -> torch.Tensor:
    answer = theirs(x.movedim(2, 1), time, encoder_hidden_states=context, added_time_ids=told)
    return answer.sample.movedim(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_the_space_time_u_net_answers_alike(agrees, name):
    config = TINY[name]
    ours, theirs = pair(config)
    for B, T, H, W in ((1, 5, 16, 16), (2, 3, 12, 20), (1, 1, 16, 8), (1, 4, 17, 22)):
        inputs = question(config, B, T, H, W)
        agrees("space-time U-Net", name, ours(*inputs), asked(theirs, *inputs), CLOSE, UNET)
    inputs = question(config, 2, 3, 12, 20)
    expected = asked(theirs, *inputs)
    pack(ours)
    agrees("space-time U-Net, packed", name, ours(*inputs), expected, CLOSE, UNET)


@torch.no_grad()
def test_a_context_of_several_tokens_is_read_alike(agrees):
    config = TINY["svd"]
    ours, theirs = pair(config)
    x, time, _, told = question(config, 2, 3, 12, 20)
    context = torch.randn(2, 5, config.context, generator=torch.Generator().manual_seed(2))
    agrees("space-time U-Net", "svd, five tokens of context", ours(x, time, context, told),
           asked(theirs, x, time, context, told), CLOSE, UNET)  # fmt: skip


def test_its_gradients_are_equal():
    config = TINY["two blocks deep, three numbers more"]
    ours, theirs = pair(config)
    inputs = question(config, 2, 3, 12, 20)
    ours(*inputs).square().sum().backward()
    asked(theirs, *inputs).square().sum().backward()
    mine = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if mine[name] is None:  # what asks of one token of context makes no difference
            assert parameter.grad.abs().max() < 1e-6, name
        elif parameter.grad.norm() > 1e-3:
            assert relative_error(mine[name], parameter.grad) < 1e-3, name


@torch.no_grad()
def test_its_bfloat16_is_as_near_to_float32_as_theirs(either):
    ours, theirs = pair(TINY["svd"])
    inputs = question(TINY["svd"], 2, 5, 16, 16)
    exact = asked(theirs, *inputs)
    ours.to(torch.bfloat16)
    pack(ours)
    mine = relative_error(ours(*inputs).float(), exact)
    x, time, context, told = (tensor.bfloat16() for tensor in inputs)
    reference = relative_error(asked(theirs.to(torch.bfloat16), x, time, context, told).float(), exact)
    assert mine < 1.2 * reference


# --- the autoencoder -----------------------------------------------------------------------------------------------


def autoencoders(config: KLConfig, assign: bool = False) -> tuple[temporal.AutoencoderKL, nn.Module]:
    torch.manual_seed(0)
    theirs = shaken(AutoencoderKLTemporalDecoder.from_config(vae_config(config, 768)))
    with torch.device("meta" if assign else "cpu"):
        ours = temporal.build(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=assign)
    return ours, theirs


def decoded(theirs: nn.Module, z: torch.Tensor, frames: int) -> torch.Tensor:
    B, _, T = z.shape[:3]
    rows = z.movedim(2, 1).flatten(0, 1)
    parts = [theirs.decode(part, num_frames=len(part) // B).sample for part in rows.split(frames * B)]
    return torch.cat(parts).unflatten(0, (B, T)).movedim(1, 2)


@torch.no_grad()
def test_the_temporal_autoencoder_answers_alike(agrees):
    config = replace(CLIP_VAE, widths=(32, 64, 64))
    ours, theirs = autoencoders(config)
    for B, T, H, W in ((1, 5, 8, 12), (2, 3, 5, 7), (1, 1, 8, 8), (1, 14, 6, 9)):
        z = torch.randn(B, 4, T, H, W, generator=torch.Generator().manual_seed(T))
        expected = decoded(theirs, z, T)
        agrees("VAE of clips, decode, whole", f"{T} frames", ours.decode(z), expected, CLOSE, VAE)
        for band in (1, 20_000, 4 << 20):
            agrees("VAE of clips, decode, by frames and bands", f"{T} frames", decode_framed(ours, z, band=band),
                   expected, CLOSE, VAE)  # fmt: skip
    pixels = torch.randn(1, 3, 2, 32, 48, generator=torch.Generator().manual_seed(7))
    wanted = theirs.encode(pixels.movedim(2, 1).flatten(0, 1)).latent_dist.mode()
    agrees("VAE of clips, encode", "2 frames", encode_banded(ours, pixels).mode()[0].movedim(1, 0), wanted,
           CLOSE, VAE)  # fmt: skip


@torch.no_grad()
def test_the_reference_s_chunks_are_not_the_whole():
    """Why there is another way to decode in little memory: this one changes the clip."""
    ours, theirs = autoencoders(replace(CLIP_VAE, widths=(32, 64, 64)))
    z = torch.randn(1, 4, 14, 8, 12, generator=torch.Generator().manual_seed(3))
    whole = decoded(theirs, z, 14)
    assert relative_error(decoded(theirs, z, 7), whole) > 0.05
    assert relative_error(decode_framed(ours, z), whole) < CLOSE


# --- CLIP's picture encoder ----------------------------------------------------------------------------------------


def vision(config: ClipVisionConfig) -> tuple[ClipVisionEncoder, nn.Module]:
    torch.manual_seed(0)
    values = {k: v for k, v in vision_config(config).items() if k not in ("architectures", "model_type")}
    theirs = shaken(CLIPVisionModelWithProjection(CLIPVisionConfig(**values)))
    with torch.device("meta"):
        ours = ClipVisionEncoder(config)
    fill(ours, theirs.state_dict(), "the reference")
    return ours.eval(), theirs


def embedded(theirs: nn.Module, pixels: torch.Tensor, config: ClipVisionConfig) -> torch.Tensor:
    processor = CLIPImageProcessor(**processor_config(config))
    small = (_resize_with_antialiasing(pixels, (config.size, config.size)) + 1) / 2
    plain = {"do_resize": False, "do_center_crop": False, "do_rescale": False}
    return theirs(
        processor(images=small, do_normalize=True, return_tensors="pt", **plain).pixel_values
    ).image_embeds


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (64, 100), (20, 24), (201, 57)], ids=str)
def test_a_picture_s_embedding(agrees, size):
    config = ClipVisionConfig(
        width=32, layers=3, heads=2, inner=64, patch=8, size=32, projection=24, activation="quick_gelu"
    )
    ours, theirs = vision(config)
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    resized = _resize_with_antialiasing(pixels, (32, 32))
    agrees("picture resized for CLIP", f"{size[1]}×{size[0]}", antialiased(pixels, 32), resized, CLOSE,
           "diffusers StableVideoDiffusionPipeline")  # fmt: skip
    agrees("CLIP's picture encoder", f"{size[1]}×{size[0]}", ours(pixels), embedded(theirs, pixels, config),
           CLOSE, VISION)  # fmt: skip


# --- published sizes -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.full
def test_the_published_u_net(agrees):
    """14 frames of 256×128: the weights alone take 6.1 GB."""
    ours, theirs = pair(SpaceTimeConfig(), assign=True)
    inputs = question(SpaceTimeConfig(), 1, 14, 16, 32)
    agrees("space-time U-Net", "svd, 14 frames, 128×256", ours(*inputs), asked(theirs, *inputs), CLOSE, UNET)


@torch.no_grad()
@pytest.mark.full
def test_the_published_autoencoder(agrees):
    ours, theirs = autoencoders(CLIP_VAE, assign=True)
    z = torch.randn(1, 4, 4, 16, 20, generator=torch.Generator().manual_seed(1))
    expected = decoded(theirs, z, 4)
    agrees("VAE of clips, decode, whole", "svd, 4 frames, 128×160", ours.decode(z), expected, CLOSE, VAE)
    agrees("VAE of clips, decode, by frames and bands", "svd, 4 frames, 128×160", decode_framed(ours, z), expected,
           CLOSE, VAE)  # fmt: skip


@torch.no_grad()
@pytest.mark.full
def test_the_published_picture_encoder(agrees):
    ours, theirs = vision(OPENCLIP_VIT_H)
    pixels = torch.rand(1, 3, 576, 1024, generator=torch.Generator().manual_seed(1)) * 2 - 1
    agrees("CLIP's picture encoder", "ViT-H/14, 576×1024", ours(pixels), embedded(theirs, pixels, OPENCLIP_VIT_H),
           CLOSE, VISION)  # fmt: skip
