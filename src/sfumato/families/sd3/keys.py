"""The names of tensors in Stable Diffusion 3 files, as tables between them and ours.

Ours are those of the diffusers layout. A single file keeps the names of Stability-AI/sd3.5's mmditx.py for the
transformer; the rest is in `published/keys.py`. Queries, keys and values are one matrix there. Where a modulation has a
shift and a scale alone, in the last block's text and before the exit, the two stand in the other order.

In templates `{p}` is weight or bias and `{i}` a block.
"""

from __future__ import annotations

from sfumato.checkpoint.rules import Drop, KeyMap, Rename, Rule, Split, SwapHalves, expand, within
from sfumato.families.published.keys import AVERAGES, CONTRASTIVE, WB
from sfumato.nn.mmdit import MMDiTConfig

ENDS = (
    Rename("x_embedder.proj.{p}", "pos_embed.proj.{p}"),
    Rename("context_embedder.{p}", "context_embedder.{p}"),
    Rename("t_embedder.mlp.0.{p}", "time_text_embed.timestep_embedder.linear_1.{p}"),
    Rename("t_embedder.mlp.2.{p}", "time_text_embed.timestep_embedder.linear_2.{p}"),
    Rename("y_embedder.mlp.0.{p}", "time_text_embed.text_embedder.linear_1.{p}"),
    Rename("y_embedder.mlp.2.{p}", "time_text_embed.text_embedder.linear_2.{p}"),
    SwapHalves("final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}"),
    Rename("final_layer.linear.{p}", "proj_out.{p}"),
)
POSITIONS = Rename("pos_embed", "pos_embed.pos_embed")
PICTURE = (  # of a block's picture stream
    Split("attn.qkv.{p}", ("attn.to_q.{p}", "attn.to_k.{p}", "attn.to_v.{p}")),
    Rename("attn.proj.{p}", "attn.to_out.0.{p}"),
    Rename("adaLN_modulation.1.{p}", "norm1.linear.{p}"),
    Rename("mlp.fc1.{p}", "ff.net.0.proj.{p}"),
    Rename("mlp.fc2.{p}", "ff.net.2.{p}"),
)
PICTURE_NORMS = (
    Rename("attn.ln_q.weight", "attn.norm_q.weight"),
    Rename("attn.ln_k.weight", "attn.norm_k.weight"),
)
SECOND = (  # the picture's attention to itself
    Split("attn2.qkv.{p}", ("attn2.to_q.{p}", "attn2.to_k.{p}", "attn2.to_v.{p}")),
    Rename("attn2.proj.{p}", "attn2.to_out.0.{p}"),
)
SECOND_NORMS = (
    Rename("attn2.ln_q.weight", "attn2.norm_q.weight"),
    Rename("attn2.ln_k.weight", "attn2.norm_k.weight"),
)
TEXT_QKV = Split("attn.qkv.{p}", ("attn.add_q_proj.{p}", "attn.add_k_proj.{p}", "attn.add_v_proj.{p}"))
TEXT = (
    TEXT_QKV,
    Rename("attn.proj.{p}", "attn.to_add_out.{p}"),
    Rename("adaLN_modulation.1.{p}", "norm1_context.linear.{p}"),
    Rename("mlp.fc1.{p}", "ff_context.net.0.proj.{p}"),
    Rename("mlp.fc2.{p}", "ff_context.net.2.{p}"),
)
LAST_TEXT = (TEXT_QKV, SwapHalves("adaLN_modulation.1.{p}", "norm1_context.linear.{p}"))
TEXT_NORMS = (
    Rename("attn.ln_q.weight", "attn.norm_added_q.weight"),
    Rename("attn.ln_k.weight", "attn.norm_added_k.weight"),
)
EXTRAS = (
    Drop("model_ema.*", AVERAGES),
    Drop("model_sampling.*", "the noise levels, which the family knows"),
    *(Drop(f"text_encoders.{name}.logit_scale", CONTRASTIVE) for name in ("clip_l", "clip_g", "t5xxl")),
)


def transformer_map(config: MMDiTConfig) -> KeyMap:
    """The transformer's original names (`joint_blocks.…`, without a prefix) to ours (`transformer_blocks.…`)."""
    rules: list[Rule] = [POSITIONS, *ENDS]
    for block in range(config.layers):
        last, dual = block == config.layers - 1, block in config.dual
        picture = PICTURE + (SECOND if dual else ())
        text = LAST_TEXT if last else TEXT
        if config.qk_norm:
            picture += PICTURE_NORMS + (SECOND_NORMS if dual else ())
            text += TEXT_NORMS
        ours = f"transformer_blocks.{block}."
        rules += within(f"joint_blocks.{block}.x_block.", ours, picture)
        rules += within(f"joint_blocks.{block}.context_block.", ours, text)
    return KeyMap(expand(rules, p=WB))
