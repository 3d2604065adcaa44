"""The U-Net against diffusers' UNet2DConditionModel with the same weights, every family and block type.

Tiny random configurations always; the published sizes under `full`. There both networks share one set of tensors, so
that a test needs the weights' memory once.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import relative_error

diffusers = pytest.importorskip("diffusers")

from sfumato.nn.embed import sinusoid  # noqa: E402
from sfumato.nn.packed import pack  # noqa: E402
from sfumato.nn.unet import UNet, UNetConfig  # noqa: E402

CLOSE = 1e-5  # ‖ours − theirs‖ / ‖theirs‖ in float32
THEIRS = "diffusers UNet2DConditionModel"

SD1 = UNetConfig()
SD2 = UNetConfig(heads=(5, 10, 20, 20), context=1024, linear=True)
SDXL = UNetConfig(
    channels=(320, 640, 1280), depths=(0, 2, 10), mid_depth=10, heads=(5, 10, 20), context=2048, linear=True,
    vector=1280 + 6 * 256,
)  # fmt: skip
REFINER = UNetConfig(
    channels=(384, 768, 1536, 1536), depths=(0, 4, 4, 0), mid_depth=4, heads=(6, 12, 24, 24), context=1280,
    linear=True, vector=1280 + 5 * 256,
)  # fmt: skip
FULL = {
    "sd1": SD1,
    "sd1-inpaint": replace(SD1, in_channels=9),
    "sd2": SD2,
    "sdxl": SDXL,
    "sdxl-refiner": REFINER,
    "sd1-lcm": replace(SD1, time_cond=256),
}

_SMALL: dict[str, Any] = {"channels": (16, 32, 32, 32), "context": 24, "groups": 8}
TINY = {
    "sd1": UNetConfig(**_SMALL, depths=(1, 1, 1, 0), heads=(2, 2, 2, 2)),
    "sd1-inpaint": UNetConfig(**_SMALL, depths=(1, 1, 1, 0), heads=(2, 2, 2, 2), in_channels=9),
    "sd2": UNetConfig(**_SMALL, depths=(1, 1, 1, 0), heads=(1, 2, 4, 4), linear=True),
    "sdxl": UNetConfig(
        channels=(16, 32, 32), depths=(0, 2, 3), mid_depth=3, heads=(1, 2, 4), context=24, groups=8, linear=True,
        vector=12 + 6 * 8,
    ),
    "sdxl-refiner": UNetConfig(
        **_SMALL, depths=(0, 2, 2, 0), mid_depth=2, heads=(1, 2, 4, 4), linear=True, vector=12 + 5 * 8
    ),
    "sd1-lcm": UNetConfig(**_SMALL, depths=(1, 1, 1, 0), heads=(2, 2, 2, 2), time_cond=20),
    "two levels, attention on both, one block each": UNetConfig(
        channels=(16, 32), depths=(1, 2), mid_depth=2, heads=(2, 4), context=24, groups=4, resnets=1, out_channels=8
    ),
    "three blocks each": UNetConfig(
        channels=(16, 32), depths=(2, 0), heads=(2, 2), context=24, groups=8, resnets=3, linear=True
    ),
}  # fmt: skip


def pooled_width(config: UNetConfig) -> tuple[int, int, int]:
    """(width of the pooled text, how many sizes, width of each size's sinusoids) of a config with a vector."""
    each = 256 if config.vector > 1000 else 8
    pooled = 1280 if each == 256 else 12
    return pooled, (config.vector - pooled) // each, each


def reference(config: UNetConfig) -> torch.nn.Module:
    """diffusers' network of that shape; its `attention_head_dim` means the number of heads."""
    attends = [depth > 0 for depth in config.depths]
    extra: dict[str, Any] = {}
    if config.vector:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": pooled_width(config)[2],
            "projection_class_embeddings_input_dim": config.vector,
        }
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.channels,
        layers_per_block=config.resnets,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        # the last level's value is the middle's; where that level attends, both are one
        transformer_layers_per_block=(*(depth or 1 for depth in config.depths[:-1]), config.mid_depth),
        attention_head_dim=config.heads,
        cross_attention_dim=config.context,
        use_linear_projection=config.linear,
        norm_num_groups=config.groups,
        time_cond_proj_dim=config.time_cond or None,
        **extra,
    ).eval()


def pair(config: UNetConfig, assign: bool = False) -> tuple[UNet, torch.nn.Module]:
    """Ours and theirs with equal weights, of which none is zero or one throughout; with `assign` the same tensors."""
    torch.manual_seed(0)
    theirs = reference(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with torch.device("meta" if assign else "cpu"):
        ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=assign)
    return ours, theirs


def question(config: UNetConfig, B: int, H: int, W: int, tokens: int = 7) -> tuple[dict, dict]:
    """The same inputs in our words and in theirs."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, context, time = draw(B, config.in_channels, H, W), draw(B, tokens, config.context), draw(B) * 200 + 500
    ours: dict[str, Any] = {"x": x, "time": time, "context": context}
    theirs: dict[str, Any] = {"sample": x, "timestep": time, "encoder_hidden_states": context}
    if config.vector:
        width, count, each = pooled_width(config)
        pooled, sizes = draw(B, width), torch.randint(0, 1500, (B, count), generator=generator)
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        ours["vector"] = torch.cat([pooled, sinusoid(sizes, each).flatten(1)], dim=1)
    if config.time_cond:
        ours["time_cond"] = theirs["timestep_cond"] = draw(B, config.time_cond)
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_answers_are_equal_at_every_size(agrees, name):
    config = TINY[name]
    ours, theirs = pair(config)
    for size in ((16, 16), (12, 20), (9, 22), (7, 3), (1, 5)):  # the last three do not halve evenly
        for B in (1, 3):
            mine, yours = question(config, B, *size)
            agrees("U-Net", name, ours(**mine), theirs(**yours).sample, CLOSE, THEIRS)
    mine, yours = question(config, 2, 12, 20)
    expected = theirs(**yours).sample
    assert relative_error(ours.to(memory_format=torch.channels_last)(**mine), expected) < CLOSE
    pack(ours)
    agrees("U-Net, packed", name, ours(**mine), expected, CLOSE, THEIRS)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (9, 13)], ids=str)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_residuals_of_a_control_network_are_added_alike(agrees, name, size):
    config = TINY[name]
    ours, theirs = pair(config)
    mine, yours = question(config, 2, *size)
    down = [torch.randn(2, C, *(-(-side // 2**level) for side in size)) for C, level in config.skips]
    mid = torch.randn_like(down[-1])
    expected = theirs(
        **yours, down_block_additional_residuals=tuple(down), mid_block_additional_residual=mid
    ).sample
    answer = ours(**mine, down_residuals=down, mid_residual=mid)
    agrees("U-Net with a ControlNet's residuals", name, answer, expected, CLOSE, THEIRS)
    assert relative_error(ours(**mine), expected) > 0.01


@torch.no_grad()
def test_without_a_guidance_embedding_an_lcm_network_answers_alike():
    config = TINY["sd1-lcm"]
    ours, theirs = pair(config)
    mine, yours = question(config, 2, 8, 8)
    mine["time_cond"] = yours["timestep_cond"] = None
    assert relative_error(ours(**mine), theirs(**yours).sample) < CLOSE


def test_gradients_are_equal():
    config = TINY["sdxl"]
    ours, theirs = pair(config)
    mine, yours = question(config, 2, 12, 20)
    ours(**mine).square().sum().backward()
    theirs(**yours).sample.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert relative_error(gradients.pop(name), parameter.grad) < 1e-4, name
    assert not gradients


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_bfloat16_is_as_near_to_float32_as_theirs(name):
    config = replace(TINY[name], channels=tuple(2 * n for n in TINY[name].channels))
    ours, theirs = pair(config)
    mine, yours = question(config, 2, 16, 24)
    exact = theirs(**yours).sample
    ours.to(torch.bfloat16)
    theirs.to(torch.bfloat16)
    for part in ("sample", "encoder_hidden_states"):
        yours[part] = yours[part].to(torch.bfloat16)
    rough = relative_error(theirs(**yours).sample, exact)
    assert relative_error(ours(**mine), exact) < 1.15 * rough
    packed = copy.deepcopy(ours)
    assert pack(packed) > 0
    assert relative_error(packed(**mine), exact) < 1.15 * rough


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_of_the_published_networks(name):
    with torch.device("meta"):
        ours, theirs = UNet(FULL[name]), reference(FULL[name])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.full
@torch.no_grad()
@pytest.mark.parametrize("name, cells", [("sd1", 64), ("sd2", 48), ("sdxl", 64)])
def test_published_sizes_answer_alike(agrees, name, cells):
    config = FULL[name]
    ours, theirs = pair(config, assign=True)
    mine, yours = question(config, 1, cells, cells, tokens=77)
    answer = theirs(**yours).sample
    agrees("U-Net", f"{name}, {8 * cells}×{8 * cells}", ours(**mine), answer, CLOSE, THEIRS)
