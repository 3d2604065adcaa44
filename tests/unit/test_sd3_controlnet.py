"""ControlNet files of Stable Diffusion 3: every layout, what they are told apart by, how they are kept, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import small_control as of_unets
import small_sd3_control as small
from helpers import CPU, noise, relative_error
from sfumato.cli.app import run
from sfumato.errors import CheckpointError, InputError
from sfumato.families.sd3.controlnet import open_control
from sfumato.families.sd3.controls import controller
from sfumato.families.sd3.shapes import SYSTEMS
from sfumato.families.sd3.system import open_system
from sfumato.families.sd3.training import reader
from sfumato.generate import Model
from sfumato.nn.quantized import can_quantize
from sfumato.planning import plan_of
from sfumato.storage import save_tensors
from sfumato.types import Conditioning, Control, Request
from small_sd3 import SIDE, SMALL, TRANSFORMERS, one_by_one, write

KINDS = ("sd3-medium", small.LARGE)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {kind: write(kind, tmp_path_factory.mktemp(kind) / "model") for kind in KINDS}


@pytest.fixture(scope="module")
def systems(places):
    return {kind: open_system(place, CPU, torch.float32, systems=SMALL) for kind, place in places.items()}


def opened(path, kind: str = "sd3-medium"):
    base = TRANSFORMERS[kind]
    entrance = {name: torch.zeros(1) for name in ("pos_embed.proj.weight", "proj_out.weight")}
    return open_control(path, base, kind, entrance)


# --- what it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [small.joint(), small.joint(extra=1, shifted=True), small.joint("sd3.5-medium")]
)
def test_a_file_and_a_folder_are_the_same(tmp_path, config):
    kind = "sd3.5-medium" if config.blocks.qk_norm else "sd3-medium"
    for path in (small.file(tmp_path / "c.safetensors", config), small.folder(tmp_path / "c", config)):
        found = opened(path, kind)
        assert found.config == config and not found.beside
        wanted = small.tensors(config)
        assert set(found.tensors) == set(wanted)
        assert all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_one_of_the_picture_alone_takes_the_entrance_of_the_model(tmp_path, layout):
    config = small.single()
    found = opened(small.file(tmp_path / "c.safetensors", config, layout), small.LARGE)
    assert found.config == config
    assert list(found.beside) == ["pos_embed.proj.weight"]
    wanted = small.tensors(config)
    assert set(found.tensors) == set(wanted)
    assert all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)


def test_what_the_folder_says_counts(tmp_path):
    place = small.folder(tmp_path / "c", small.joint(), force_zeros_for_pooled_projection=False)
    config = opened(place).config
    assert not config.zero_pooled and config.shifted
    place = small.folder(tmp_path / "d", small.single(), force_zeros_for_pooled_projection=True)
    config = opened(place, small.LARGE).config
    assert config.zero_pooled and not config.shifted


@pytest.mark.parametrize(("number", "span"), [(0, (-1.0, 1.0)), (1, (0.5, 128.0)), (2, (-1.0, 1.0))])
def test_stability_s_files_say_which_picture_they_read(tmp_path, number, span):
    held = small.tensors(small.single(), "original") | {
        "control_type": torch.tensor(number, dtype=torch.int32)
    }
    save_tensors(tmp_path / "c.safetensors", {name: t.contiguous() for name, t in held.items()})
    assert opened(tmp_path / "c.safetensors", small.LARGE).config.span == span


@pytest.mark.parametrize(("name", "canny"), [("sd3.5-large-controlnet-canny", True), ("uncanny", False)])
def test_a_converted_one_says_it_by_its_name(tmp_path, name, canny):
    place = small.folder(tmp_path / name, small.single())
    assert (opened(place, small.LARGE).config.span == (0.5, 128.0)) is canny
    joint = small.folder(tmp_path / f"{name}-joint", small.joint())
    assert opened(joint).config.span == (-1.0, 1.0)


# --- what is refused -----------------------------------------------------------------------------------------------


def refused(path, kind: str = "sd3-medium", error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        opened(path, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_for_another_transformer(tmp_path):
    place = small.file(tmp_path / "c.safetensors", small.joint(small.LARGE))
    said = refused(place, "sd3-medium", InputError)
    assert "for a transformer of width 64" in said and "that of sd3-medium is of width 48" in said


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"task_embedding": (6, 320)}, "a union ControlNet"),
        ({"controlnet_x_embedder.weight": (2, 2)}, "a ControlNet of FLUX"),
        ({"lora_controlnet": (0,)}, "a Control-LoRA"),
        ({"lora_unet_x.lora_down.weight": (2, 2)}, "a LoRA, not a ControlNet"),
        ({"controlnet_blocks.0.weight": (2, 2), "transformer_blocks.0.attn.to_q.weight": (2, 2),
          "transformer_blocks.0.attn.qkv.weight": (6, 2)}, "a mixture of two layouts"),
    ],
)  # fmt: skip
def test_relatives_are_refused_by_name(tmp_path, held, words):
    save_tensors(tmp_path / "c.safetensors", {name: torch.zeros(shape) for name, shape in held.items()})
    assert f"this is {words}" in refused(tmp_path / "c.safetensors")


def test_those_of_other_families(tmp_path, systems):
    place = of_unets.file(tmp_path / "c.safetensors", "sd1")
    assert "a ControlNet of Stable Diffusion 1, 2 or XL, which belongs on one" in refused(place)


def test_blocks_that_begin_anew(tmp_path):
    """Stability's for medium models are told what the model makes of the pooled text, as wide as a token."""
    held = small.tensors(small.single(), "original")
    held["time_text_embed.text_embedder.linear_1.weight"] = torch.zeros(64, 64)
    save_tensors(tmp_path / "c.safetensors", {name: t.contiguous() for name, t in held.items()})
    assert "whose blocks each begin anew" in refused(tmp_path / "c.safetensors", small.LARGE)


def test_channels_that_nobody_gives(tmp_path):
    held = small.tensors(small.joint())
    held["pos_embed_input.proj.weight"] = torch.zeros(48, 19, 2, 2)
    save_tensors(tmp_path / "c.safetensors", held)
    assert "reads 19 channels of control pictures; 16, and one of a mask" in refused(
        tmp_path / "c.safetensors"
    )


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path):
    held = small.tensors(small.joint())
    del held["controlnet_blocks.1.bias"]
    save_tensors(tmp_path / "c.safetensors", held | {"stranger": torch.zeros(1)})
    said = refused(tmp_path / "c.safetensors")
    assert "1 missing: controlnet_blocks.1.bias" in said and "1 unexpected: stranger" in said


def test_a_table_of_positions_that_is_no_square(tmp_path):
    held = small.tensors(small.joint())
    held["pos_embed.pos_embed"] = torch.zeros(1, 140, 48)
    save_tensors(tmp_path / "c.safetensors", held)
    assert "no square table of positions" in refused(tmp_path / "c.safetensors")


def test_a_number_that_is_none(tmp_path, systems):
    held = small.tensors(small.joint())
    held["controlnet_blocks.1.bias"] = torch.full_like(held["controlnet_blocks.1.bias"], torch.nan)
    save_tensors(tmp_path / "c.safetensors", held)
    having = systems["sd3-medium"].with_controls({"pose": tmp_path / "c.safetensors"})
    with pytest.raises(CheckpointError, match=r"controlnet_blocks\.1\.bias holds NaN"):
        having.controller("pose", torch.rand(1, 3, SIDE, SIDE))


# --- at work -------------------------------------------------------------------------------------------------------


def drawn(model: Model, **changes) -> torch.Tensor:
    control = Control("pose", noise(SIDE, SIDE), weight=0.8)
    request = Request("a cat", steps=3, guidance=4.0, size=(SIDE, SIDE), controls=(control,), **changes)
    request = model.complete(request)
    return model.sample(model.condition(request), request.seeds(), request)


FILES = {"sd3-medium": small.joint(), small.LARGE: small.single()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_it_draws_the_same_however_networks_are_kept(tmp_path, systems, kind, offload):
    place = small.file(tmp_path / "c.safetensors", FILES[kind])
    having = systems[kind].with_controls({"pose": place})
    there, elsewhere = (Model(s, CPU, "m") for s in (having, having.offloaded(offload)))
    assert torch.equal(drawn(there), drawn(elsewhere))
    assert not elsewhere.system.controlnets._held


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_of_memory_counts_it(tmp_path, systems, kind):
    config = FILES[kind]
    place = small.file(tmp_path / "c.safetensors", config)
    model = Model(systems[kind].with_controls({"pose": place}), CPU, "m")
    bare = Request("a cat", size=(SIDE, SIDE), steps=2)
    shown = replace(bare, controls=(Control("pose", noise(SIDE, SIDE)),))
    network = small.network(config)
    weights = 4 * sum(t.numel() for t in (*network.parameters(), *network.buffers()))
    for offload in ("none", "model"):
        plans = [plan_of(model, request, offload, None).stages for request in (bare, shown)]
        without, having = (next(s for s in stages if s.name == "denoise") for stages in plans)
        assert having.weights - without.weights == pytest.approx(weights, rel=0.05)
        assert having.activations > without.activations
        assert [stage.name for stage in plans[1]] == ["load", "text", "encode", "denoise", "decode"]


def test_in_bfloat16_and_eight_bits(tmp_path):
    if not can_quantize(torch.empty(0)):
        pytest.skip("this CPU has no eight-bit products")
    found = opened(small.file(tmp_path / "c.safetensors", small.joint()))
    torch.manual_seed(0)
    given = {
        "x": torch.randn(2, 16, 8, 8),
        "time": torch.tensor(500.0),
        "context": torch.randn(2, 7, 96),
        "vector": torch.randn(2, 72),
        "hint": torch.randn(1, 16, 8, 8),
    }
    exact, *others = (
        torch.cat([t.float().flatten() for t in found.network(CPU, dtype)(**given)])
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    )
    for other in others:
        assert (other - exact).norm() < 0.1 * exact.norm()


@pytest.mark.full
def test_on_the_command_line_with_a_picture_and_a_mask(tmp_path, monkeypatch, places, capsys):
    monkeypatch.chdir(tmp_path)
    for kind, system in SMALL.items():
        monkeypatch.setitem(SYSTEMS, kind, system)
    small.file(tmp_path / "c.safetensors", small.joint())
    noise(SIDE, SIDE).save("pose.png")
    noise(SIDE, SIDE, 5).save("photo.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[8:40, 16:48] = 255
    Image.fromarray(mask).save("mask.png")
    place = str(places["sd3-medium"])
    common = ["generate", "a cat", "-m", place, "--steps", "2", "--dtype", "fp32", "--seed", "1"]
    control = ["--controlnet", "pose=c.safetensors", "--control", "pose=pose.png:0.9"]
    for more in ([], ["--image", "photo.png"], ["--image", "photo.png", "--mask", "mask.png"]):
        size = [] if more else ["--size", str(SIDE)]
        for extra, out in (([], "plain.png"), (control, "shown.png")):
            assert run([*common, *size, *more, *extra, "-o", out]) == 0
        plain, shown = (np.asarray(Image.open(name)) for name in ("plain.png", "shown.png"))
        assert (plain != shown).any()
        if "--mask" in more:
            assert (shown[mask == 0] == np.asarray(Image.open("photo.png"))[mask == 0]).all()
    assert run(["generate", "a", "-m", "c.safetensors"]) == 2
    assert "an SD3 ControlNet; it belongs on a model" in capsys.readouterr().err


@torch.no_grad()
def test_tokens_of_a_missing_encoder_are_read_as_one_by_one(places):
    """By a ControlNet at work, and by one and a LoRA in training."""
    system = open_system(places["sd3-medium"], CPU, torch.float32, systems=SMALL, without=("t5",))
    cond = reader(system, ["a red cube"])(["a red cube", "a sphere"])
    assert cond.mask is not None and cond.tokens.shape[1] == 77 + 2
    each = Conditioning(one_by_one(cond), None, cond.vector)
    trainee = system.control_trainee(2, 0)
    network, x, time = (
        small.network(trainee.network.config),
        torch.randn(2, 16, 1, 8, 12),
        torch.rand(2) * 900,
    )
    hints = torch.randn(2, 16, 8, 12)
    found = [trainee.adds(network, x, time, told, hints) for told in (cond, each)]
    found += [controller(network, hints)(x, time, told, False) for told in (cond, each)]
    found += [(trainee.answer(x, time, told, found[0]),) for told in (cond, each)]
    for one, other in zip(found[::2], found[1::2], strict=True):
        for ours, same in zip(one, other, strict=True):
            assert relative_error(ours, same) < 1e-5


def test_one_that_was_trained_opens_in_diffusers(tmp_path, systems):
    """Its file is what diffusers' network holds, told nothing more than its shape."""
    from diffusers import SD3ControlNetModel

    trainee = systems["sd3-medium"].control_trainee(2, 0)
    file = trainee.save(trainee.network.state_dict(), tmp_path / "c.safetensors")
    values = {
        name: v for name, v in small.json_of(trainee.network.config).items() if not name.startswith("_")
    }
    SD3ControlNetModel(**values).load_state_dict({n: t.float() for n, t in load_file(file).items()})
    assert opened(file).config == trainee.network.config == small.joint(layers=2)
    with pytest.raises(InputError, match="blocks must be from 1 to 2, of the 3 of the model, not 3"):
        systems["sd3-medium"].control_trainee(3, 0)
