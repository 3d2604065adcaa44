"""What the networks of the Stable Diffusion family measure: the numbers that names and sizes of tensors follow from.

Sources: Stability-AI/stablediffusion and generative-models, `configs/`, and the `config.json` files of the published
diffusers folders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sfumato.autoencoder.kl import KLConfig
from sfumato.families.published.kinds import TextPart
from sfumato.nn.unet import UNetConfig
from sfumato.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H


@dataclass(frozen=True)
class System:
    """A kind of checkpoint: its networks, and the pixels per side that it was trained on."""

    unet: UNetConfig
    vae: KLConfig
    text: tuple[TextPart, ...]
    size: int

    @property
    def denoiser(self) -> UNetConfig:
        return self.unet


VAE = KLConfig()
VAE_XL = KLConfig(scaling_factor=0.13025)

SD1 = System(
    UNetConfig(),
    VAE,
    (TextPart("text_encoder", CLIP_L, ("cond_stage_model.transformer.",), open_clip=False),),
    size=512,
)
SD2 = System(
    UNetConfig(heads=(5, 10, 20, 20), context=1024, linear=True),
    VAE,
    (
        TextPart(
            "text_encoder",
            OPENCLIP_H,
            # the second is SD-Turbo's, which was written by the newer repository
            ("cond_stage_model.model.", "conditioner.embedders.0.model."),
            open_clip=True,
        ),
    ),
    size=768,
)
SDXL = System(
    UNetConfig(4, (320, 640, 1280), (0, 2, 10), 10, (5, 10, 20), context=2048, linear=True, vector=2816),
    VAE_XL,
    (
        TextPart("text_encoder", CLIP_L, ("conditioner.embedders.0.transformer.",), open_clip=False),
        TextPart("text_encoder_2", OPENCLIP_BIGG, ("conditioner.embedders.1.model.",), open_clip=True),
    ),
    size=1024,
)
REFINER = System(
    UNetConfig(
        4, (384, 768, 1536, 1536), (0, 4, 4, 0), 4, (6, 12, 24, 24), context=1280, linear=True, vector=2560
    ),
    VAE_XL,
    (TextPart("text_encoder_2", OPENCLIP_BIGG, ("conditioner.embedders.0.model.",), open_clip=True),),
    size=1024,
)


def inpainting(system: System) -> System:
    """The system whose U-Net also reads a mask and the masked picture's latent: 4 + 1 + 4 channels."""
    return replace(system, unet=replace(system.unet, in_channels=9))


def told_guidance(system: System) -> System:
    """The system whose U-Net reads the guidance scale with the time, in 256 waves (latent consistency models)."""
    return replace(system, unet=replace(system.unet, time_cond=256))


SYSTEMS = {
    "sd1": SD1,
    "sd1-inpaint": inpainting(SD1),
    "sd1-lcm": told_guidance(SD1),
    "sd2": SD2,
    "sd2-inpaint": inpainting(SD2),
    "sdxl": SDXL,
    "sdxl-inpaint": inpainting(SDXL),
    "sdxl-lcm": told_guidance(SDXL),
    "sdxl-refiner": REFINER,
}
