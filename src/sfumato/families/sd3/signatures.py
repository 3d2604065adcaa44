"""The marks by which transformers of Stable Diffusion 3 and 3.5 are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfumato.checkpoint.detect import Shape, Signature
from sfumato.families.lora import TITLES
from sfumato.families.published.keys import DENOISER_PREFIX
from sfumato.families.published.signatures import refused
from sfumato.families.sd3.shapes import SAME_TENSORS, SYSTEMS, System
from sfumato.nn.mmdit import MMDiTConfig

# where a mark stands, in the original names and in those of diffusers
QKV, NORM = (
    ("x_block.attn.qkv.weight", "attn.to_q.weight"),
    ("x_block.attn.ln_q.weight", "attn.norm_q.weight"),
)
SECOND = ("x_block.attn2.proj.weight", "attn2.to_out.0.weight")
CONTROL = ("controlnet_blocks.0.weight", "pos_embed_input.proj.weight")  # of a ControlNet
TEXT = ("context_block.adaLN_modulation.1.weight", "norm1_context.linear.weight")


def _marks(config: MMDiTConfig, original: bool) -> tuple[dict[str, Shape], list[str]]:
    """The tensors that tell transformers apart, and those that must not be there: entrances, table of positions, the
    last block, norms, and the blocks that attend twice.
    """
    D, side = config.width, 0 if original else 1
    blocks = ("joint_blocks.", "transformer_blocks.")[side]
    names = (
        ("x_embedder.proj", "pos_embed", "y_embedder.mlp.0", "final_layer.linear"),
        ("pos_embed.proj", "pos_embed.pos_embed", "time_text_embed.text_embedder.linear_1", "proj_out"),
    )
    entrance, table, pooled, exit_ = names[side]
    last = config.layers - 1
    marks: dict[str, Shape] = {
        f"{entrance}.weight": (D, config.channels, config.patch, config.patch),
        table: (1, config.positions**2, D),
        "context_embedder.weight": (D, config.context),
        f"{pooled}.weight": (D, config.pooled),
        f"{exit_}.weight": (config.channels * config.patch**2, D),
        f"{blocks}0.{QKV[side]}": (3 * D if original else D, D),
        f"{blocks}{last}.{TEXT[side]}": (2 * D, D),
    }
    absent = [f"{blocks}{config.layers}.{QKV[side]}"]
    if config.qk_norm:
        marks[f"{blocks}{last}.{NORM[side]}"] = (config.head_width,)
    else:
        absent.append(f"{blocks}0.{NORM[side]}")
    if config.dual:
        marks[f"{blocks}{max(config.dual)}.{SECOND[side]}"] = (D, D)
    absent += [
        f"{blocks}{n}.{SECOND[side]}" for n in (0, max(config.dual, default=0) + 1) if n not in config.dual
    ]
    return marks, absent


def signatures(systems: Mapping[str, System] = SYSTEMS) -> tuple[Signature, ...]:
    """All of them: transformers that we read, alone and in whole files, in both layouts; and ControlNets alone."""
    found = []
    for kind, system in systems.items():
        if kind in SAME_TENSORS:
            continue
        for layout, part, prefix in (
            ("original", "checkpoint", DENOISER_PREFIX),
            ("original", "transformer", ""),
            ("diffusers", "transformer", ""),
        ):
            marks, absent = _marks(system.transformer, original=layout == "original")
            required = {prefix + name: shape for name, shape in marks.items()}
            forbidden = tuple(prefix + name for name in absent)
            found.append(Signature(kind, part, layout, required, forbidden, prefix))
    alone = "an SD3 ControlNet; it belongs on a model (--controlnet KIND=FILE), and is not one"
    return (*found, *refused(alone, dict.fromkeys(CONTROL)))


def control_title(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> str:
    """What the models are called that a ControlNet is for; "" of a file that is none of theirs."""
    return TITLES["sd3"] if shapes.keys() >= set(CONTROL) else ""
