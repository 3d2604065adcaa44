"""What the networks of Stable Video Diffusion measure: the numbers that names and sizes of tensors follow from.

Sources: Blattmann et al. 2023 (arXiv 2311.15127), app. D; Stability-AI/generative-models, configs/inference/svd.yaml;
the `config.json` files of the published diffusers folders.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.autoencoder.kl import KLConfig
from sfumato.families.published.kinds import TextPart
from sfumato.nn.spacetime import SpaceTimeConfig
from sfumato.text.vision import OPENCLIP_VIT_H

IMAGE_ENCODER = "image_encoder"


@dataclass(frozen=True)
class System:
    """A kind of checkpoint: its networks, and what it was trained on. `text` has what reads the picture.

    size: pixels per side that latents were trained for, as `config.json` counts them; shape: (width, height) of clips.
    """

    unet: SpaceTimeConfig
    vae: KLConfig
    text: tuple[TextPart, ...]
    frames: int
    size: int = 768
    shape: tuple[int, int] = (1024, 576)

    @property
    def denoiser(self) -> SpaceTimeConfig:
        return self.unet


READER = TextPart(IMAGE_ENCODER, OPENCLIP_VIT_H, ("conditioner.embedders.0.open_clip.model.visual.",), True)
VAE = KLConfig(temporal=True, use_post_quant_conv=False)
SYSTEMS = {
    "svd": System(SpaceTimeConfig(), VAE, (READER,), frames=14),
    "svd-xt": System(SpaceTimeConfig(), VAE, (READER,), frames=25),
}
SAME_TENSORS = {"svd-xt": "svd"}  # no name and no shape tells them apart
