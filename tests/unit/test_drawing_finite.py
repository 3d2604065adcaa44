"""A network that gives NaN or infinity: drawing stops at that step and names the layer, whatever draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import small_sd
import small_sd3
import small_svd
from sfumato import load
from sfumato.cli.app import run
from sfumato.drawing.finite import first_not_finite, watched
from sfumato.drawing.request import levels_of
from sfumato.errors import NonFiniteError
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.families.sd3.system import open_system
from sfumato.generate import Model
from sfumato.storage import load_tensors, save_tensors
from sfumato.types import Request
from small_video import video_system

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"


def made_loud(file: Path, name: str) -> None:
    """Weights that are finite in float16, and too large for what they make to be."""
    tensors = load_tensors(file)
    tensors[name] = tensors[name] * (60_000 / tensors[name].abs().max())
    save_tensors(file, tensors)


@pytest.fixture
def loud_unet(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(SYSTEMS, "sd1", small_sd.SMALL["sd1"])
    place = small_sd.write("sd1", tmp_path / "model")
    made_loud(place / UNET, "mid_block.resnets.0.conv1.weight")
    return place


def spoilt(layer: torch.nn.Module) -> None:
    """From now on it makes no numbers."""
    layer.register_forward_hook(lambda module, given, answer: answer * torch.nan)


def test_a_unet_that_overflows_in_half_precision(loud_unet, tmp_path, capsys):
    asked = [
        "generate",
        "a cat",
        "-m",
        str(loud_unet),
        "--steps",
        "3",
        "--size",
        "32",
        "-o",
        str(tmp_path / "o.png"),
    ]
    assert run([*asked, "--dtype", "fp16"]) == 1
    assert capsys.readouterr().err == (
        "error: mid_block.resnets.0.conv1 of the U-Net gives NaN or infinity in float16, at step 1 of 3; "
        "draw with --dtype bf16 or fp32\n"
    )
    assert run([*asked, "--dtype", "fp32"]) == 0  # the advice is sound


@pytest.mark.parametrize(
    ("more", "sound", "done", "where"),
    [
        ({}, 1, 1, "step 2 of 4"),
        ({"reuse": 2}, 1, 2, "step 3 of 4"),  # the layer is not asked at the second
        ({"hires": {"scale": 2.0, "strength": 0.5, "steps": 6}}, 5, 5, "step 2 of 3"),  # in the second pass
    ],
    ids=["one pass", "reuse", "hires"],
)
def test_the_step_is_that_of_the_schedule(loud_unet, more, sound, done, where):
    """The layer spoils only what comes after its first `sound` answers; `done` steps are then drawn."""
    model = load(loud_unet, "cpu", dtype=torch.float32)
    layer = model.system.denoiser.get_submodule("mid_block.resnets.0.conv1")
    calls = []

    def spoil(module, given, answer):
        calls.append(len(calls))
        return answer * torch.nan if len(calls) > sound else answer

    layer.register_forward_hook(spoil)
    request = Request.from_dict({"prompt": "a cat", "steps": 4, "size": [32, 32], "sampler": "euler", **more})
    seen = []
    with pytest.raises(
        NonFiniteError, match=rf"mid_block\.resnets\.0\.conv1 .* at {where}; its weights"
    ) as caught:
        model.generate(request, on_step=seen.append)
    assert len(seen) == done
    assert caught.value.layer == "mid_block.resnets.0.conv1" and caught.value.code == "not_finite"


def test_a_transformer(tmp_path):
    place = small_sd3.write("sd3-medium", tmp_path / "model")
    model = Model(open_system(place, CPU, torch.float32, systems=small_sd3.SMALL), CPU)
    spoilt(model.system.denoiser.proj_out)
    with pytest.raises(NonFiniteError, match=r"^proj_out of the transformer gives .* at step 1 of 2"):
        model.generate(Request("a cat", steps=2, size=(64, 64)))


def test_a_clip(tmp_path):
    model = small_svd.opened(small_svd.write("svd", tmp_path / "model"))
    spoilt(model.system.denoiser.conv_out)
    with pytest.raises(NonFiniteError, match=r"^conv_out of the U-Net gives .* at step 1 of 2"):
        model.generate(small_svd.REQUEST)


@pytest.mark.parametrize("frames", [None, 5])
def test_our_own(frames):
    system = video_system()
    spoilt((system.video.animator if frames else system.denoiser).dit.blocks[0])
    with pytest.raises(NonFiniteError, match=r"^dit\.blocks\.0 of the denoiser gives .* at step 1 of 2"):
        Model(system, CPU).generate(Request("a cat", steps=2, frames=frames))


def test_what_the_network_is_told(loud_unet):
    model = load(loud_unet, "cpu", dtype=torch.float32)
    with torch.no_grad():
        next(iter(model.system.text.encoders)).text_model.final_layer_norm.bias.fill_(torch.nan)
    with pytest.raises(
        NonFiniteError, match=r"^the text encoder gives NaN or infinity in float32, at step 1 of 2"
    ):
        model.generate(Request("a cat", steps=2, size=(32, 32)))


def test_a_sampler_that_makes_no_numbers(loud_unet, monkeypatch):
    model = load(loud_unet, "cpu", dtype=torch.float32)
    shape = model.latent_shape(32, 32)
    request = model.complete(Request("a cat", steps=2, size=(32, 32)))
    sigmas = levels_of(model, request)
    cond = model.system.condition(["a cat", None], request)
    denoise = watched(model, lambda: model.denoiser(cond, request), cond, request, sigmas)
    assert denoise(torch.zeros(1, *shape), sigmas[0]).isfinite().all()
    with pytest.raises(
        NonFiniteError,
        match=r"^the sampler's step gives NaN or infinity in float32, at step 1 of 2; use another sampler",
    ):
        denoise(torch.full((1, *shape), torch.nan), sigmas[0])


def test_the_innermost_layer_is_named_and_ears_are_taken_off():
    class Square(torch.nn.Module):
        def forward(self, x):
            return x * x

    network = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU(), Square()), torch.nn.ReLU()
    )
    big = torch.full((1, 2), 1e30)
    with torch.no_grad():
        network[0].weight.fill_(1)
        assert first_not_finite(network, lambda: network(big)) == ("1.1", True)
        assert first_not_finite(network, lambda: network(big * torch.inf)) == ("", False)
        assert first_not_finite(network, lambda: network(big * 0)) == ("", True)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())
