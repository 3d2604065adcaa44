"""The MMDiT against diffusers' SD3Transformer2DModel: the same random weights, the same answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel

from sfumato.families.sd3.shapes import SYSTEMS
from sfumato.nn.mmdit import MMDiT, MMDiTConfig

BOUND, THEIRS = 1e-5, "diffusers SD3Transformer2DModel"
PLAIN = MMDiTConfig(channels=16, layers=3, heads=3, head_width=16, context=40, pooled=24, positions=12)
CASES = {
    "plain": PLAIN,
    "norms of queries and keys": replace(PLAIN, qk_norm=True),
    "MMDiT-X": replace(PLAIN, qk_norm=True, dual=(0, 1), layers=4),
    "a second attention in the last block": replace(PLAIN, dual=(2,)),
}


def theirs_of(config: MMDiTConfig, seed: int = 0) -> SD3Transformer2DModel:
    """diffusers' network; what it begins as zeros or ones, such as gains, is drawn too."""
    torch.manual_seed(seed)
    network = SD3Transformer2DModel(
        sample_size=config.positions, patch_size=config.patch, in_channels=config.channels,
        out_channels=config.channels, num_layers=config.layers, attention_head_dim=config.head_width,
        num_attention_heads=config.heads, joint_attention_dim=config.context, caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled, pos_embed_max_size=config.positions,
        dual_attention_layers=config.dual, qk_norm="rms_norm" if config.qk_norm else None,
    )  # fmt: skip
    for name, weight in network.named_parameters():
        if weight.ndim == 1:
            weight.data.normal_(std=0.1).add_("norm_" in name and name.endswith("weight"))
    return network.eval()


def ours_of(config: MMDiTConfig, theirs: torch.nn.Module) -> MMDiT:
    with torch.device("meta"):
        network = MMDiT(config)
    network.load_state_dict(theirs.state_dict(), assign=True)  # strict: the names are the same
    return network.eval()


def inputs_of(config: MMDiTConfig, height: int, width: int, batch: int = 2, tokens: int = 11):
    torch.manual_seed(1)
    x = torch.randn(batch, config.channels, height, width)
    return (
        x,
        torch.linspace(900, 30, batch),
        torch.randn(batch, tokens, config.context),
        torch.randn(batch, config.pooled),
    )


def answers(config, height, width, skip=(), theirs=None, **sizes):
    theirs = theirs or theirs_of(config)
    x, time, context, vector = inputs_of(config, height, width, **sizes)
    with torch.no_grad():
        mine = ours_of(config, theirs)(x, time, context, vector, skip_layers=skip)
        other = theirs(x, context, vector, time, skip_layers=list(skip), return_dict=False)[0]
    return mine, other


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(24, 24), (10, 16), (14, 6)])
def test_it_answers_as_the_reference(agrees, case, size):
    """At the table's full size, and where a part of it is taken, with an even and an odd rest."""
    mine, other = answers(CASES[case], *size)
    agrees("MMDiT", f"{case}, {size[1]}×{size[0]} cells", mine, other, BOUND, THEIRS)


@pytest.mark.parametrize("skip", [(1,), (0, 2), (3,)])
def test_layers_left_out(agrees, skip):
    mine, other = answers(CASES["MMDiT-X"], 12, 16, skip)
    agrees("MMDiT, layers left out", f"without {skip}", mine, other, BOUND, THEIRS)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sd3-medium", "sd3.5-medium"])
def test_of_published_size(agrees, kind):
    mine, other = answers(SYSTEMS[kind].transformer, 32, 24, batch=1, tokens=154)
    agrees("MMDiT", f"{kind}, 192×256 pixels", mine, other, BOUND, THEIRS)


@pytest.mark.full
def test_of_the_large_one_s_width(agrees):
    """Four of its 38 blocks in float32; all of them would take 32 GB."""
    config = replace(SYSTEMS["sd3.5-large"].transformer, layers=4)
    mine, other = answers(config, 32, 24, batch=1, tokens=154)
    agrees("MMDiT", "sd3.5-large with 4 blocks, 192×256 pixels", mine, other, BOUND, THEIRS)
