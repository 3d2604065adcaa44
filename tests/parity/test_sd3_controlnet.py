"""ControlNets of Stable Diffusion 3 against diffusers: what one adds, and whole pictures drawn with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
)
from diffusers.models import SD3MultiControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import small_sd3_control as small
from helpers import CPU
from sfumato.drawing.sample import origin_of
from sfumato.families.published.openers import denoiser
from sfumato.families.sd3.controlnet import control_map
from sfumato.families.sd3.shapes import SYSTEMS
from sfumato.families.sd3.system import open_system
from sfumato.generate import Model
from sfumato.nn.mmdit import MMDiT
from sfumato.nn.mmdit_control import MMDiTControl, MMDiTControlConfig
from sfumato.sampling import SeededNoise
from sfumato.tasks import canvas as tasks
from sfumato.types import Control, Inpaint, Request
from small_sd3 import SIDE, SMALL, TRANSFORMERS, write

STEPS, BOUND, CLOSE = 20, 1e-4, 1e-5
NETWORK, PIPELINE = "diffusers SD3ControlNetModel", "diffusers StableDiffusion3ControlNetPipeline"
CONFIGS = {
    "medium": small.joint(),
    "medium, with a mask": small.joint(layers=1, extra=1, shifted=True),
    "3.5 medium": small.joint("sd3.5-medium"),
    "3.5 large, joint": small.joint(small.LARGE, 3),
    "3.5 large, of the picture alone": small.single(),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def reference(config: MMDiTControlConfig, state: dict[str, Tensor]) -> SD3ControlNetModel:
    """diffusers' network of the same shape and weights; it takes the base's entrance where it has none."""
    values = {name: value for name, value in small.json_of(config).items() if not name.startswith("_")}
    made = SD3ControlNetModel(**values).eval()
    if not config.joint:
        base = SD3Transformer2DModel(
            sample_size=16, patch_size=config.blocks.patch, num_layers=1, attention_head_dim=config.blocks.head_width,
            num_attention_heads=config.blocks.heads, joint_attention_dim=8, caption_projection_dim=config.blocks.width,
            pooled_projection_dim=8, pos_embed_max_size=config.blocks.positions,
        )  # fmt: skip
        made.pos_embed = made._get_pos_embed_from_transformer(base)
    made.load_state_dict(state)
    return made


def inputs(config: MMDiTControlConfig, height: int = 8, width: int = 12) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shape = config.blocks
    return {
        "x": torch.randn(2, shape.channels, height, width),
        "time": torch.tensor([40.0, 700.0]),
        "context": torch.randn(2, 11, shape.context),
        "vector": torch.randn(2, shape.pooled),
        "hint": torch.randn(2, shape.channels + config.extra, height, width),
    }


def theirs_adds(
    net: SD3ControlNetModel, config: MMDiTControlConfig, given: dict[str, Tensor]
) -> list[Tensor]:
    x, context, pooled = given["x"], given["context"], given["vector"]
    if config.zero_pooled:  # which their pipeline does
        pooled = torch.zeros_like(pooled)
    if net.pos_embed is not None and not config.joint:
        net_in, net.pos_embed = net.pos_embed(x), None
    else:
        net_in = x
    return net(
        net_in,
        given["hint"],
        1.0,
        context if config.joint else None,
        pooled,
        given["time"],
        return_dict=False,
    )[0]


def joined(tensors) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_it_adds(agrees, name):
    config = CONFIGS[name]
    made = small.network(config)
    packed = denoiser(config, made.state_dict(), "control", CPU, torch.float32)
    given = inputs(config)
    wanted = joined(theirs_adds(reference(config, made.state_dict()), config, given))
    for how, net in (("", made), (", packed", packed)):
        agrees("ControlNet of SD3", f"{name}{how}", joined(net(**given)), wanted, CLOSE, NETWORK)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_the_transformer_makes_of_it(agrees, count):
    """Each tensor is added after as many blocks as the others, and none after the last block."""
    shape = replace(TRANSFORMERS["sd3-medium"], layers=4)
    torch.manual_seed(0)
    ours = MMDiT(shape).eval()
    theirs = SD3Transformer2DModel(
        sample_size=16, num_layers=4, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=96,
        caption_projection_dim=48, pooled_projection_dim=72, pos_embed_max_size=12, out_channels=16,
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    given = inputs(MMDiTControlConfig(shape))
    control = [torch.randn(2, 24, 48) for _ in range(count)]
    wanted = theirs(
        given["x"], given["context"], given["vector"], given["time"], block_controlnet_hidden_states=control,
        return_dict=False,
    )[0]  # fmt: skip
    found = ours(given["x"], given["time"], given["context"], given["vector"], control=control)
    agrees("transformer with a ControlNet", f"{count} tensors for 4 blocks", found, wanted, CLOSE,
           "diffusers SD3Transformer2DModel")  # fmt: skip
    assert not torch.allclose(found, ours(given["x"], given["time"], given["context"], given["vector"]))


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {
        kind: write(kind, tmp_path_factory.mktemp(kind) / "model") for kind in ("sd3-medium", small.LARGE)
    }


@pytest.fixture
def by_the_mean(monkeypatch):
    """Has diffusers take the middle of what the autoencoder answers."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def picture(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def pipeline_of(place, controlnet, kind=StableDiffusion3ControlNetPipeline):
    t5 = PreTrainedTokenizerFast(
        tokenizer_file=str(place / "tokenizer_3" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    pipeline = kind.from_pretrained(place, tokenizer_3=t5, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def request(*controls: Control, **more) -> Request:
    return Request(
        "a red metal sphere", negative="blurry", seed=3, steps=STEPS, guidance=4.0, sampler="euler",
        schedule="flow_match", size=(SIDE, SIDE), prompt_rules="none", controls=controls, **more,
    )  # fmt: skip


def drawn(model: Model, asked: Request) -> tuple[Tensor, Tensor]:
    """(initial noise, latents after the steps)."""
    asked = model.complete(asked)
    noise = SeededNoise(asked.seeds(), model.system.latent_shape(1, SIDE, SIDE)).initial()[:, :, 0]
    canvas = tasks.canvas(asked)
    origin = None if canvas is None else origin_of(model, canvas, asked)
    return noise, model.sample(model.condition(asked), asked.seeds(), asked, None, origin)[:, :, 0]


def theirs_drawn(pipeline, noise: Tensor, **more) -> Tensor:
    asked = request()
    return pipeline(
        asked.prompt, negative_prompt=asked.negative, width=SIDE, height=SIDE, num_inference_steps=STEPS,
        guidance_scale=asked.guidance, latents=noise.clone(), output_type="latent", **more,
    ).images  # fmt: skip


CASES = {
    "medium": ("sd3-medium", small.joint()),
    "3.5 large, joint": (small.LARGE, small.joint(small.LARGE, 3)),
    "3.5 large, of the picture alone": (small.LARGE, small.single()),
    "medium, told the pooled text": ("sd3-medium", small.joint(zero_pooled=False, shifted=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_picture_is_that_of_the_pipeline(agrees, places, tmp_path, by_the_mean, name):
    kind, config = CASES[name]
    folder = small.folder(tmp_path / "control", config)
    system = open_system(places[kind], CPU, torch.float32, systems=SMALL).with_controls({"pose": folder})
    model = Model(system, CPU, kind)
    control = picture(0)
    noise, found = drawn(model, request(Control("pose", control, weight=0.7)))
    pipeline = pipeline_of(places[kind], SD3ControlNetModel.from_pretrained(folder))
    wanted = theirs_drawn(pipeline, noise, control_image=control, controlnet_conditioning_scale=0.7)
    agrees(f"pipeline with a ControlNet, latents after {STEPS} steps", name, found, wanted, BOUND, PIPELINE)
    assert (found - drawn(model, request())[1]).norm() > 0.01 * found.norm()


def test_two_at_once_one_of_them_in_some_steps(agrees, places, tmp_path, by_the_mean):
    kind, configs = "sd3-medium", (small.joint(), small.joint())
    folders = [small.folder(tmp_path / str(n), config, seed=n) for n, config in enumerate(configs)]
    system = open_system(places[kind], CPU, torch.float32, systems=SMALL)
    model = Model(system.with_controls(dict(zip("ab", folders, strict=True))), CPU, kind)
    first, second = picture(1), picture(2)
    asked = request(Control("a", first, weight=0.7), Control("b", second, weight=0.4, start=0.2, end=0.6))
    noise, found = drawn(model, asked)
    nets = SD3MultiControlNetModel([SD3ControlNetModel.from_pretrained(folder) for folder in folders])
    wanted = theirs_drawn(
        pipeline_of(places[kind], nets), noise, control_image=[first, second],
        controlnet_conditioning_scale=[0.7, 0.4], control_guidance_start=[0.0, 0.2], control_guidance_end=[1.0, 0.6],
    )  # fmt: skip
    agrees(f"pipeline with a ControlNet, latents after {STEPS} steps", "two, one of them in part", found, wanted,
           BOUND, PIPELINE)  # fmt: skip


def test_two_of_different_depth_add_up(places, tmp_path):
    """Which diffusers cuts to the shorter: each acts where it does alone."""
    kind = "sd3.5-large"
    files = {
        "a": small.folder(tmp_path / "a", small.joint(kind, 2)),
        "b": small.folder(tmp_path / "b", small.joint(kind, 3), seed=4),
    }
    plain = open_system(places[kind], CPU, torch.float32, systems=SMALL)
    both = plain.with_controls(files)
    cond = both.condition(["a red sphere", ""], Model(both, CPU, kind).complete(Request(size=(SIDE, SIDE))))
    x, time = torch.randn(2, 16, 1, 16, 16), torch.tensor([700.0, 700.0])
    pixels = torch.rand(1, 3, SIDE, SIDE)
    adds = {name: both.controller(name, pixels)(x, time, cond, False) for name in files}
    assert len(adds["a"]) == len(adds["b"]) == 6
    for name in files:
        alone = plain.with_controls({name: files[name]})
        wanted = alone.network(x, time, cond, control=alone.controller(name, pixels)(x, time, cond, False))
        torch.testing.assert_close(both.network(x, time, cond, control=adds[name]), wanted)
    summed = tuple(a + b for a, b in zip(adds["a"], adds["b"], strict=True))
    assert both.network(x, time, cond, control=summed).isfinite().all()


def test_one_that_reads_a_mask(agrees, places, tmp_path, by_the_mean):
    """With the request's mask and picture, from noise: diffusers' inpainting pipeline keeps nothing itself."""
    folder = small.folder(tmp_path / "control", small.joint(extra=1))
    system = open_system(places["sd3-medium"], CPU, torch.float32, systems=SMALL).with_controls(
        {"inpaint": folder}
    )
    model = Model(system, CPU, "sd3-medium")
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (16, 8, 48, 40))
    control = picture(0)
    asked = request(
        Control("inpaint", control), image=control, mask=mask, strength=1.0, inpaint=Inpaint(blur=0)
    )
    asked = model.complete(asked)
    noise = SeededNoise(asked.seeds(), model.system.latent_shape(1, SIDE, SIDE)).initial()[:, :, 0]
    # without the origin: what is kept by the known latent is another matter
    found = model.sample(model.condition(asked), asked.seeds(), asked)[:, :, 0]
    net = SD3ControlNetModel.from_pretrained(folder)
    pipeline = pipeline_of(places["sd3-medium"], net, StableDiffusion3ControlNetInpaintingPipeline)
    wanted = theirs_drawn(pipeline, noise, control_image=control, control_mask=mask)
    agrees(f"pipeline with a ControlNet, latents after {STEPS} steps", "one that reads a mask", found, wanted, BOUND,
           "diffusers StableDiffusion3ControlNetInpaintingPipeline")  # fmt: skip
    everywhere = model.sample(model.condition(asked), asked.seeds(), replace(asked, mask=None, inpaint=None))
    assert not torch.allclose(found, everywhere[:, :, 0], atol=1e-3)


# --- published sizes -----------------------------------------------------------------------------------------------


def published(kind: str, layers: int, joint: bool) -> MMDiTControlConfig:
    base = SYSTEMS[kind].transformer
    if joint:
        return MMDiTControlConfig(replace(base, layers=layers))
    shape = replace(base, layers=layers, qk_norm=False)
    return MMDiTControlConfig(shape, joint=False, zero_pooled=False, shifted=True)


@pytest.mark.parametrize(("kind", "layers", "joint"), [("sd3-medium", 6, True), ("sd3.5-large", 19, False)])
def test_the_tensors_are_those_of_diffusers(kind, layers, joint):
    config = published(kind, layers, joint)
    with torch.device("meta"):
        ours = MMDiTControl(config)
        values = {name: v for name, v in small.json_of(config).items() if not name.startswith("_")}
        theirs = SD3ControlNetModel(**values | {"sample_size": 128})
    wanted = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    found = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    if not joint:
        found = {name: shape for name, shape in found.items() if not name.startswith("pos_embed.")}
    assert found == wanted
    assert set(control_map(config).ours) == set(ours.state_dict())
    if joint:
        assert sum(p.numel() for p in ours.parameters()) == 538_805_760


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "kind", "layers", "joint"),
    [
        ("medium, 6 layers", "sd3-medium", 6, True),
        ("3.5 large, of the picture alone, 2 of 19 layers", "sd3.5-large", 2, False),
    ],
)
def test_published_sizes(agrees, name, kind, layers, joint):
    config = published(kind, layers, joint)
    made = small.network(config)
    given = inputs(config, 32, 32)
    wanted = joined(theirs_adds(reference(config, made.state_dict()), config, given))
    agrees("ControlNet of SD3", name, joined(made(**given)), wanted, CLOSE, NETWORK)
