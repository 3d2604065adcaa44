"""What the networks of Stable Diffusion 3 and 3.5 measure: the numbers that names and sizes of tensors follow from.

Sources: Esser et al. 2024 (arXiv 2403.03206), sec. 4; Stability-AI/sd3.5, sd3_infer.py and mmditx.py; the `config.json`
files of the published diffusers folders.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.autoencoder.kl import KLConfig
from sfumato.families.published.kinds import TextPart
from sfumato.nn.mmdit import MMDiTConfig
from sfumato.text.clip import OPENCLIP_BIGG, ClipConfig
from sfumato.text.t5 import T5_XXL


@dataclass(frozen=True)
class System:
    """A kind of checkpoint: its networks, and the pixels per side that it was trained on."""

    transformer: MMDiTConfig
    vae: KLConfig
    text: tuple[TextPart, ...]
    size: int = 1024

    @property
    def denoiser(self) -> MMDiTConfig:
        return self.transformer


VAE = KLConfig(
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
# CLIP-L's embedding is projected too; single files leave the matrix out, which is that of no change
CLIP_L = ClipConfig(768, 12, 12, "quick_gelu", projection=768)
TEXT = (
    TextPart("text_encoder", CLIP_L, ("text_encoders.clip_l.transformer.",)),
    TextPart("text_encoder_2", OPENCLIP_BIGG, ("text_encoders.clip_g.transformer.",)),
    TextPart("text_encoder_3", T5_XXL, ("text_encoders.t5xxl.transformer.",)),
)
LARGE = System(MMDiTConfig(layers=38, heads=38, qk_norm=True), VAE, TEXT)
SYSTEMS = {
    "sd3-medium": System(MMDiTConfig(), VAE, TEXT),
    "sd3.5-medium": System(MMDiTConfig(positions=384, qk_norm=True, dual=tuple(range(13))), VAE, TEXT),
    "sd3.5-large": LARGE,
    "sd3.5-large-turbo": LARGE,
}
SAME_TENSORS = {"sd3.5-large-turbo": "sd3.5-large"}  # no name and no shape tells them apart
