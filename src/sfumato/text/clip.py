"""CLIP's text encoders: token ids to features (Radford et al. 2021; OpenCLIP, Cherti et al. 2022).

The transformer is that of the `transformers` library, which is imported when an encoder is made. Names of parameters
are the published ones, `text_model.…` and `text_projection.weight`, whatever the library's version makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import checks
from sfumato.errors import CheckpointError, InputError
from sfumato.text.windows import LENGTH

ACTIVATIONS = ("quick_gelu", "gelu")  # x·σ(1.702x) of OpenAI's, exact GELU of OpenCLIP's
EOS = 49_407
PROJECTION = "text_projection.weight"


@dataclass(frozen=True)
class ClipConfig:
    """Shape of a text encoder. Positions are 77, epsilon of the norms 1e-5."""

    width: int  # channels of a token
    layers: int  # transformer blocks
    heads: int  # of attention; 64 channels each in all published ones
    activation: str  # of the feed-forward layers
    projection: int = 0  # width of the pooled embedding; 0: there is none
    inner: int = 0  # width inside a feed-forward layer; 0 means 4 · width
    vocabulary: int = 49_408  # token ids

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "vocabulary"):
            checks.whole(name, getattr(self, name), 1)
        for name in ("projection", "inner"):
            checks.whole(name, getattr(self, name), 0)
        if self.width % self.heads:
            raise InputError(f"width {self.width} does not divide into {self.heads} heads", argument="heads")
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}",
                argument="activation",
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClipConfig:
        """From a model folder's `config.json`. `CheckpointError` when it is not that of a CLIP encoder of 77 tokens."""
        known = {
            "width": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "activation": "hidden_act",
            "inner": "intermediate_size",
            "vocabulary": "vocab_size",
        }
        missing = [theirs for theirs in known.values() if theirs not in values]
        if missing or values.get("max_position_embeddings", LENGTH) != LENGTH:
            raise CheckpointError(
                "the text encoder's config is not CLIP's: "
                + (f"it lacks {', '.join(missing)}" if missing else f"it does not have {LENGTH} positions")
            )
        projected = values.get("architectures") == ["CLIPTextModelWithProjection"]
        try:
            return cls(
                **{ours: values[theirs] for ours, theirs in known.items()},
                projection=values.get("projection_dim", 0) if projected else 0,
            )
        except InputError as error:
            raise CheckpointError(f"the text encoder's config is wrong: {error}") from None


CLIP_L = ClipConfig(768, 12, 12, "quick_gelu")
# OpenCLIP-H has 24 blocks; files keep 23, because features are those before the last
OPENCLIP_H = ClipConfig(1024, 23, 16, "gelu")
OPENCLIP_BIGG = ClipConfig(1280, 32, 20, "gelu", projection=1280)

Placed = Sequence[tuple[int, int, Tensor]]  # row, position and vectors (n, D) that stand there instead of ids


class ClipTextEncoder(nn.Module):
    """ids (B, 77) → features (B, 77, D), and a pooled embedding (B, P) where there is a projection."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        # these two modules pull in the least of the library
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

        self.config = config
        self.text_model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=config.inner or 4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=LENGTH,
                hidden_act=config.activation,
                attn_implementation="sdpa",  # type: ignore[call-arg]  # read by the base class
            )
        )
        # positions are counted when they are needed: no file holds the library's buffer, and nothing here reads it
        self.text_model.embeddings.register_buffer("position_ids", None, persistent=False)
        self.text_projection = (
            nn.Linear(config.width, config.projection, bias=False) if config.projection else None
        )

    def forward(
        self,
        ids: Tensor,
        placed: Placed = (),
        visible: Tensor | None = None,
        clip_skip: int = 1,
        final_norm: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """ids: (B, 77) int64. placed: textual inversions. visible: (B, 77) bool, False where no token may look.

        clip_skip: which block's output the features are, counted from the last, which is 1, as in A1111. That is
        `hidden_states[-clip_skip]`: diffusers' `clip_skip` n is our n + 1 for SD 1 and 2, and n + 2 for SDXL, whose
        count begins at the last block but one; ComfyUI's is −clip_skip. final_norm: whether the final layer norm
        follows, as it does for SD 1 and 2 at any clip_skip, and does not for SDXL.

        Pooled is the last block's output at the first end mark, normed and projected, whatever clip_skip is.
        """
        if not 1 <= clip_skip <= self.config.layers:
            raise InputError(
                f"clip_skip must be from 1, the last layer, to {self.config.layers}, not {clip_skip}",
                argument="clip_skip",
            )
        model = self.text_model
        h = self._embed(ids, placed)  # (B, N, D)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=ids.device).tril()[None, None]
        if visible is not None:
            mask = mask & visible[:, None, None, :]  # (B, 1, N, N)
        chosen = h
        last = self.config.layers + 1 - (1 if self.config.projection else clip_skip)
        for number, layer in enumerate(model.encoder.layers[:last], 1):
            h = layer(h, attention_mask=mask)
            if number == self.config.layers + 1 - clip_skip:
                chosen = h
        features = model.final_layer_norm(chosen) if final_norm else chosen
        if self.text_projection is None:
            return features, None
        ends = (ids == EOS).int().argmax(dim=1)  # the first: windows may be padded with the end mark
        pooled = model.final_layer_norm(h[torch.arange(len(ids), device=ids.device), ends])  # (B, D)
        return features, self.text_projection(pooled)

    def _embed(self, ids: Tensor, placed: Placed) -> Tensor:
        """(B, N) → (B, N, D): tokens, with inversions in their places, and positions."""
        embeddings = self.text_model.embeddings
        h = embeddings.token_embedding(ids)
        for row, start, vectors in placed:
            h[row, start : start + len(vectors)] = vectors.to(h)
        return h + embeddings.position_embedding.weight[: ids.shape[1]]
