"""ControlNets against diffusers' ControlNetModel with the same weights: tiny ones, and the published size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import relative_error
from sd_reference import control_reference
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.embed import sinusoid
from sfumato.nn.packed import pack
from sfumato.nn.unet import UNetConfig

CLOSE = 1e-5
THEIRS = "diffusers ControlNetModel"
_SMALL: dict[str, Any] = {"channels": (16, 32, 32, 32), "context": 24, "groups": 8}
SHAPES = {
    "sd1": UNetConfig(**_SMALL, depths=(1, 1, 1, 0), heads=(2, 2, 2, 2)),
    "sd2": UNetConfig(**_SMALL, depths=(1, 1, 1, 0), heads=(1, 2, 4, 4), linear=True),
    "sdxl": UNetConfig(
        channels=(16, 32, 32), depths=(0, 2, 3), mid_depth=3, heads=(1, 2, 4), context=24, groups=8, linear=True,
        vector=12 + 6 * 8,
    ),
}  # fmt: skip
FULL = {
    "sd1": UNetConfig(),
    "sd2": UNetConfig(heads=(5, 10, 20, 20), context=1024, linear=True),
    "sdxl": UNetConfig(4, (320, 640, 1280), (0, 2, 10), 10, (5, 10, 20), context=2048, linear=True, vector=2816),
}  # fmt: skip
PARAMETERS = {"sd1": 361_279_120, "sdxl": 1_251_014_160}


def pair(config: ControlNetConfig, assign: bool = False) -> tuple[ControlNet, torch.nn.Module]:
    """Ours and theirs with equal weights, none of them zero throughout."""
    torch.manual_seed(0)
    theirs = control_reference(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "controlnet_" in name and not parameter.any():
                parameter.normal_(std=parameter.flatten(1).shape[1] ** -0.5)
    with torch.device("meta" if assign else "cpu"):
        ours = ControlNet(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=assign)
    return ours, theirs


def question(config: ControlNetConfig, B: int, H: int, W: int, tokens: int = 7) -> tuple[dict, dict]:
    """The same inputs in our words and in theirs; the picture is among both as pixels."""
    generator = torch.Generator().manual_seed(1)
    unet, f = config.unet, config.factor
    x = torch.randn(B, unet.in_channels, H, W, generator=generator)
    context = torch.randn(B, tokens, unet.context, generator=generator)
    time = torch.randn(B, generator=generator) * 200 + 500
    pixels = torch.rand(B, 3, H * f, W * f, generator=generator)
    ours: dict[str, Any] = {"x": x, "time": time, "context": context}
    theirs: dict[str, Any] = {
        "sample": x, "timestep": time, "encoder_hidden_states": context, "controlnet_cond": pixels,
        "return_dict": False,
    }  # fmt: skip
    if unet.vector:
        each = 256 if unet.vector > 1000 else 8
        width, count = unet.vector - 6 * each, 6
        pooled = torch.randn(B, width, generator=generator)
        sizes = torch.randint(0, 1500, (B, count), generator=generator)
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        ours["vector"] = torch.cat([pooled, sinusoid(sizes, each).flatten(1)], dim=1)
    return {**ours, "pixels": pixels}, theirs


def asked(network: ControlNet, question: dict, **more) -> torch.Tensor:
    """All residuals of ours, one after the other."""
    hint = network.features(question["pixels"])
    answer = network(**{k: v for k, v in question.items() if k != "pixels"}, hint=hint, **more)
    return torch.cat([each.flatten() for each in answer])


def theirs_asked(network: torch.nn.Module, question: dict, **more) -> torch.Tensor:
    down, middle = network(**question, **more)
    return torch.cat([each.flatten() for each in (*down, middle)])


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_residuals_are_equal_at_every_size(agrees, name):
    config = ControlNetConfig(SHAPES[name], (4, 8, 12, 16))
    ours, theirs = pair(config)
    for size in ((16, 16), (12, 20), (7, 3)):
        for B in (1, 3):
            mine, yours = question(config, B, *size)
            expected = theirs_asked(theirs, yours)
            assert expected.abs().max() > 0.1
            agrees("ControlNet", name, asked(ours, mine), expected, CLOSE, THEIRS)
    pack(ours)
    agrees("ControlNet, packed", name, asked(ours, mine), expected, CLOSE, THEIRS)


@torch.no_grad()
@pytest.mark.parametrize("how", ["guess", "pooled", "bgr", "half as deep"])
def test_its_variants_answer_alike(agrees, how):
    shape = replace(SHAPES["sdxl"], depths=(0, 1, 1), mid_depth=1) if "deep" in how else SHAPES["sdxl"]
    config = ControlNetConfig(shape, (4, 8, 16), pooled=how == "pooled", bgr=how == "bgr")
    ours, theirs = pair(config)
    mine, yours = question(config, 2, 12, 20)
    expected = theirs_asked(theirs, yours, guess_mode=how == "guess")
    agrees("ControlNet", how, asked(ours, mine, guess=how == "guess"), expected, CLOSE, THEIRS)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_theirs(either):
    config = ControlNetConfig(replace(SHAPES["sd1"], channels=(32, 64, 64, 64)), (4, 8, 12, 16))
    ours, theirs = pair(config)
    mine, yours = question(config, 2, 16, 24)
    exact = theirs_asked(theirs, yours)
    ours.to(torch.bfloat16)
    theirs.to(torch.bfloat16)
    for part in ("sample", "encoder_hidden_states", "controlnet_cond"):
        yours[part] = yours[part].to(torch.bfloat16)
    rough = relative_error(theirs_asked(theirs, yours), exact)
    assert relative_error(asked(ours, mine), exact) < 1.15 * rough
    assert pack(ours) > 0
    assert relative_error(asked(ours, mine), exact) < 1.15 * rough


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_of_the_published_networks(name):
    with torch.device("meta"):
        ours, theirs = (make(ControlNetConfig(FULL[name])) for make in (ControlNet, control_reference))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    count = sum(p.numel() for p in ours.parameters())
    assert count == PARAMETERS.get(name, count)


@pytest.mark.full
@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_the_published_size_answers_alike(agrees, name):
    config = ControlNetConfig(FULL[name])
    ours, theirs = pair(config, assign=True)
    mine, yours = question(config, 1, 64, 64, tokens=77)
    agrees("ControlNet", f"{name}, 512×512", asked(ours, mine), theirs_asked(theirs, yours), CLOSE, THEIRS)
