"""ControlNet for the multimodal diffusion transformer: a stack of blocks that reads a picture's latent beside the noisy
one, and adds what each block finds to the tokens of the transformer.

Sources: Zhang et al. 2023 (arXiv 2302.05543), sec. 3; names of parameters and arithmetic are those of diffusers'
`SD3ControlNetModel`. Two kinds are in use: of joint blocks, which read the prompt too, and of blocks for the picture
alone, which take the base's entrance for the noisy latent (Stability's for the large model).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import InputError
from sfumato.nn.mmdit import (
    KEPT,
    JointAttention,
    JointBlock,
    MMDiT,
    MMDiTConfig,
    Modulation,
    PatchEmbed,
    TimeTextEmbedding,
    check_inputs,
    counts_of_all,
    modulated,
    norm,
)
from sfumato.nn.spatial import FeedForward, TanhGELU

CONTROL_KEPT = (*KEPT, "pos_embed_input", "controlnet_blocks")  # in eight bits


@dataclass(frozen=True)
class MMDiTControlConfig:
    """blocks: the shape of its own blocks and of the transformer that they add to, which is of the same width.

    span: what black and white of the control picture are for the autoencoder, −1 and 1 but for one published kind.
    """

    blocks: MMDiTConfig
    extra: int = 0  # channels that it reads behind the picture's latent: 1 for the mask of what is to be kept
    joint: bool = True  # it reads the prompt's tokens
    zero_pooled: bool = True  # of the prompt it is told no pooled embedding, but zeros
    shifted: bool = False  # latents of control pictures are moved by the autoencoder's shift, as others are
    span: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        if self.extra not in (0, 1):
            raise InputError(f"extra must be 0 or 1, not {self.extra!r}", argument="extra")
        if not self.joint and (self.blocks.dual or self.blocks.qk_norm):
            raise InputError("blocks for the picture alone have no norms and no second attention")


class HintEmbed(nn.Module):
    """The control picture's latent (B, C, H, W) → tokens (B, H/p · W/p, D) without places."""

    def __init__(self, config: MMDiTControlConfig):
        super().__init__()
        patch, channels = config.blocks.patch, config.blocks.channels + config.extra
        self.proj = nn.Conv2d(channels, config.blocks.width, patch, stride=patch)

    def forward(self, hint: Tensor) -> Tensor:
        return self.proj(hint).flatten(2).transpose(1, 2).contiguous()


class SingleBlock(nn.Module):
    """Attention of the picture to itself and a feed-forward layer, each behind a modulated norm and a gate."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        D = config.width
        self.norm1 = Modulation(D, 6)
        self.attn = JointAttention(config, joint=False)
        self.ff = FeedForward(D, TanhGELU(D, 4 * D))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """x: (B, N, D); told: (B, D), after its activation."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(told)  # each (B, 1, D)
        x = torch.addcmul(x, gate, self.attn(modulated(norm(x), shift, scale))[0])
        return torch.addcmul(x, gate_ff, self.ff(modulated(norm(x), shift_ff, scale_ff)))


class MMDiTControl(nn.Module):
    """(noisy latent, time, text, latent of the picture) → what is added to the tokens after the transformer's blocks.

    As `MMDiT`: build it under `torch.device("meta")` when weights are about to be read.
    """

    def __init__(self, config: MMDiTControlConfig):
        super().__init__()
        self.config = config
        shape, D = config.blocks, config.blocks.width
        self.pos_embed = PatchEmbed(shape)
        self.pos_embed_input = HintEmbed(config)
        self.time_text_embed = TimeTextEmbedding(shape)
        self.context_embedder = nn.Linear(shape.context, D) if config.joint else None
        self.transformer_blocks = nn.ModuleList(
            [
                JointBlock(shape, last=False, dual=n in shape.dual) if config.joint else SingleBlock(shape)
                for n in range(shape.layers)
            ]
        )
        self.controlnet_blocks = nn.ModuleList([nn.Linear(D, D) for _ in range(shape.layers)])

    def begin(self) -> MMDiTControl:
        """Zeros where it adds to the transformer and where the picture enters: it begins by changing nothing."""
        for layer in (self.pos_embed_input.proj, *self.controlnet_blocks):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return self

    @classmethod
    def of(cls, transformer: MMDiT, layers: int) -> MMDiTControl:
        """A fresh one for a transformer, which must hold plain weights: a copy of its entrance and of its first blocks,
        in their type. The last block is none to copy: its text's stream ends there.
        """
        shape = transformer.config
        if not 1 <= layers < shape.layers:
            raise InputError(
                f"blocks must be from 1 to {shape.layers - 1}, of the {shape.layers} of the model, not {layers}",
                argument="control.blocks",
            )
        first = replace(shape, layers=layers, dual=tuple(n for n in shape.dual if n < layers))
        made = cls(MMDiTControlConfig(first)).begin()
        theirs = transformer.state_dict()
        with torch.no_grad():
            for name, tensor in made.state_dict().items():
                if name in theirs:
                    tensor.copy_(theirs[name])
        return made.to(transformer.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.pos_embed.pos_embed.dtype

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        hint: Tensor,
    ) -> tuple[Tensor, ...]:
        """For each of its blocks (B, N, D), as `MMDiT` takes them.

        x, time, context, vector, mask: as the transformer has them. hint: (B or 1, C + extra, H, W), the control
        picture's latent, of the cells of x. Raises `InputError` where a shape is not the config's.
        """
        shape = self.config.blocks
        pooled = check_inputs(shape, x, context, vector, mask)
        wanted = shape.channels + self.config.extra, *x.shape[-2:]
        if hint.shape[1:] != wanted or len(hint) not in (1, len(x)):
            raise InputError(
                f"hint must have shape (B, {', '.join(map(str, wanted))}), not {tuple(hint.shape)}",
                argument="hint",
            )
        dtype = self.dtype
        pooled = torch.zeros_like(pooled) if self.config.zero_pooled else pooled
        told = functional.silu(self.time_text_embed(time.expand(len(x)), pooled.to(dtype)))  # (B, D)
        h = self.pos_embed(x.to(dtype)) + self.pos_embed_input(hint.to(dtype))  # (B, N, D)
        text = None if self.context_embedder is None else self.context_embedder(context.to(dtype))
        counts = counts_of_all(h, mask)
        found = []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            if text is None:
                h = block(h, told)
            else:
                h, text = block(h, text, told, counts)
            found.append(out(h))
        return tuple(found)
