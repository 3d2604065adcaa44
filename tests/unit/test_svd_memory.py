"""What Stable Video Diffusion takes, told before: traces, FLOPs, plans, and the file of the published size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import hollow
from sfumato import planning
from sfumato.cli.app import run
from sfumato.families.published.openers import blank
from sfumato.families.svd.family import FAMILY
from sfumato.families.svd.shapes import IMAGE_ENCODER, SYSTEMS
from sfumato.flops import count_flops
from sfumato.generate import load
from sfumato.memory import LiveBytes
from sfumato.receipts.work import by_stage, work_of
from sfumato.types import Request
from small_svd import REQUEST, SIZE, opened, picture, write

PUBLISHED = dict(SYSTEMS)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write("svd", tmp_path_factory.mktemp("svd") / "model")


def test_the_trace_of_a_small_one_is_what_it_allocates(place):
    model = opened(place)
    request = model.complete(replace(REQUEST, frames=6))
    stages = {s.name: s for s in model.system.trace(request, SIZE, 1, encodes=False, offload="model")}
    denoise = model.denoiser(model.condition(request), request)
    x = torch.randn(1, *model.system.latent_shape(6, SIZE[1], SIZE[0]))
    with torch.inference_mode(), LiveBytes() as real:
        denoise(x, torch.tensor(0.7))
    assert stages["denoise"].activations == pytest.approx(real.peak, rel=0.05)
    with torch.inference_mode(), LiveBytes() as real:
        model.decode_pixels(x)
    assert real.peak <= stages["decode"].activations <= 1.5 * real.peak
    assert set(stages) == {"load", "text", "denoise", "decode"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of the full size, of zeros that take no place on the disk."""
    system = PUBLISHED["svd"]
    configs = {"unet": system.unet, "vae": system.vae, IMAGE_ENCODER: system.text[0].config}
    ours = {
        f"{part}.{name}": tensor
        for part, config in configs.items()
        for name, tensor in blank(config).state_dict().items()
    }
    path = tmp_path_factory.mktemp("published") / "svd.safetensors"
    return hollow(FAMILY.file_map(system).to_theirs(ours), path)


def test_the_flops_told_before_are_those_done(place):
    """The picture's encoding among them, which is a part of telling the network what to draw."""
    model = opened(place)
    request = model.complete(REQUEST)
    told = by_stage(work_of(model, request))
    assert sum(told.values()) == pytest.approx(count_flops(lambda: model.generate(request)), rel=0.02)
    alone = count_flops(lambda: model.system.autoencoder.encode(torch.zeros(1, 3, 1, *SIZE[::-1])))
    assert told["text"] > alone > 0


@pytest.mark.full
def test_the_published_one_fits_where_it_should(published):
    """14 frames of 576×1024 in bfloat16 with a network at a time, in 8 GiB; and less of what is smaller."""
    model = load(published, dtype=torch.bfloat16, offload="model")
    request = Request(image=picture())
    found = planning.plan_of(model, request, "model", 8 * 2**30)
    assert found.fits and model.complete(request).size == (1024, 576)
    weights = {stage.name: stage.weights for stage in found.stages}
    assert weights["denoise"] == pytest.approx(2 * 1_524_623_082, rel=0.05)
    assert weights["text"] == pytest.approx(2 * 632_076_800, rel=0.01)
    short = planning.plan_of(model, replace(request, frames=7, size=(512, 288)), "model", None)
    assert short.peak < found.peak


def test_inspect_tells_the_published_one(published, capsys):
    assert run(["inspect", str(published), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["family"] == "svd" and set(told["parts"]) == {"unet", "vae", IMAGE_ENCODER, "other"}
    assert told["parts"]["unet"]["parameters"] == 1_524_623_082


@pytest.mark.full  # many plans
def test_a_refused_clip_is_told_how_many_frames_fit(place):
    model = opened(place)
    request = model.complete(replace(REQUEST, frames=5))
    said = str(planning.refusal(model, request, planning.plan(model, request, "none")))
    assert "drawing 5 frames of" in said and " or `frames` 3 (" in said
