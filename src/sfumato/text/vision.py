"""CLIP's picture encoder: pixels to one embedding (Radford et al. 2021; OpenCLIP, Cherti et al. 2022).

The transformer is that of the `transformers` library, which is imported when an encoder is made. Names of parameters
are the published ones, `vision_model.…` and `visual_projection.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato import checks
from sfumato.errors import CheckpointError, InputError
from sfumato.text.clip import ACTIVATIONS

PROJECTION = "visual_projection.weight"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in CLIP's training pictures, and
STD = (0.26862954, 0.26130258, 0.27577711)  # their deviations
_NAMES = {  # ours to those of a folder's config.json
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "patch": "patch_size",
    "size": "image_size",
    "projection": "projection_dim",
    "activation": "hidden_act",
}


@dataclass(frozen=True)
class ClipVisionConfig:
    """Shape of a picture encoder; the defaults are OpenCLIP's ViT-H/14. Epsilon of the norms is 1e-5."""

    width: int = 1280  # channels of a token
    layers: int = 32  # transformer blocks
    heads: int = 16
    inner: int = 5120  # width inside a feed-forward layer
    patch: int = 14  # pixels per side of a token
    size: int = 224  # pixels per side of a picture
    projection: int = 1024  # width of the embedding
    activation: str = "gelu"  # of the feed-forward layers

    def __post_init__(self) -> None:
        for name in _NAMES:
            if name != "activation":
                checks.whole(name, getattr(self, name), 1)
        if self.width % self.heads:
            raise InputError(f"width {self.width} does not divide into {self.heads} heads", argument="heads")
        if self.size % self.patch:
            raise InputError(
                f"size {self.size} does not divide into patches of {self.patch}", argument="size"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}",
                argument="activation",
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClipVisionConfig:
        """From a model folder's `config.json`. `CheckpointError` when it is not that of CLIP's picture encoder."""
        missing = [theirs for theirs in _NAMES.values() if theirs not in values]
        if missing:
            raise CheckpointError(
                f"the picture encoder's config is not CLIP's: it lacks {', '.join(missing)}"
            )
        try:
            return cls(**{ours: values[theirs] for ours, theirs in _NAMES.items()})
        except InputError as error:
            raise CheckpointError(f"the picture encoder's config is wrong: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The fields of such a `config.json` that say its shape."""
        return {theirs: getattr(self, ours) for ours, theirs in _NAMES.items()}


OPENCLIP_VIT_H = ClipVisionConfig()


class ClipVisionEncoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] of any size → embeddings (B, P)."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        # these two modules pull in the least of the library
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPVisionModel

        self.config = config
        self.vision_model = CLIPVisionModel(
            CLIPVisionConfig(**config.to_json(), attn_implementation="sdpa")  # type: ignore[call-arg]
        )
        # positions are counted when they are needed: no file holds the library's buffer, and nothing here reads it
        self.vision_model.embeddings.register_buffer("position_ids", None, persistent=False)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Resized as its training pictures were, without a crop: a picture of another shape is stretched."""
        model, parts = self.vision_model, self.vision_model.embeddings
        x = normalized(antialiased(pixels.float(), self.config.size))
        patches = parts.patch_embedding(x.to(parts.patch_embedding.weight.dtype))  # (B, D, h, w)
        first = parts.class_embedding.expand(len(x), 1, -1)
        h = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + parts.position_embedding.weight
        h = model.pre_layrnorm(h)  # (B, 1 + h·w, D)
        for layer in model.encoder.layers:
            h = layer(h, attention_mask=None)
        return self.visual_projection(model.post_layernorm(h[:, 0]))


def normalized(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] → of mean 0 and deviation 1 over CLIP's training pictures."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((pixels + 1) / 2 - mean) / std


def antialiased(pixels: Tensor, side: int) -> Tensor:
    """(B, C, H, W) → (B, C, side, side): blurred by what shrinking asks for, then bicubic from corner to corner.

    kornia's `resize(…, antialias=True)`, by which Stable Video Diffusion was trained and diffusers draws: a Gaussian of
    deviation (factor − 1) / 2, in a window of four deviations, with the picture reflected at its edges.
    """
    for dim in (-1, -2):
        sigma = max((pixels.shape[dim] / side - 1) / 2, 0.001)
        window = int(max(4 * sigma, 3))
        pixels = _blurred(pixels, sigma, window + (window % 2 == 0), dim)
    return functional.interpolate(pixels, (side, side), mode="bicubic", align_corners=True)


def _blurred(pixels: Tensor, sigma: float, window: int, dim: int) -> Tensor:
    """Along one dimension, by an odd window."""
    places = torch.arange(window, dtype=pixels.dtype, device=pixels.device) - window // 2
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = (weights / weights.sum()).view(1, 1, -1, *([1] if dim == -2 else []))
    kernel = kernel if dim == -2 else kernel[:, :, None]  # (1, 1, window, 1) or (1, 1, 1, window)
    B, C, H, W = pixels.shape
    reach = window // 2
    sides = (0, 0, reach, reach) if dim == -2 else (reach, reach, 0, 0)
    whole = functional.pad(pixels, sides, mode="reflect" if reach < pixels.shape[dim] else "replicate")
    return functional.conv2d(whole.flatten(0, 1)[:, None], kernel).view(B, C, H, W)
