"""Stable Video Diffusion in both layouts: names against the full-size references, files read, written and told apart.

diffusers reads no single file of it, so what a single file says is checked by what it draws.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers import relative_error
from sfumato.checkpoint.detect import identify
from sfumato.checkpoint.rules import shapes
from sfumato.errors import CheckpointError, InputError
from sfumato.families import checkpoint_families
from sfumato.families.convert import convert
from sfumato.families.published import folder as published
from sfumato.families.published.checkpoint import all_signatures, open_checkpoint
from sfumato.families.published.convert import write_file, write_folder
from sfumato.families.svd import folder, keys
from sfumato.families.svd.family import FAMILY
from sfumato.families.svd.shapes import IMAGE_ENCODER, SYSTEMS
from sfumato.families.svd.system import open_system
from sfumato.generate import Model
from sfumato.storage import read_json
from sfumato.types import Request
from small_svd import SIZE, SMALL, original, picture, write

CPU = torch.device("cpu")
SIGNATURES = tuple(all_signatures(checkpoint_families()))
NETWORKS = {
    "unet": UNetSpatioTemporalConditionModel,
    "vae": AutoencoderKLTemporalDecoder,
    IMAGE_ENCODER: CLIPVisionModelWithProjection,
}
REQUEST = Request(image=picture(), seed=1, steps=2, frames=3, size=SIZE)


def opened(path: Path, **options):
    return open_checkpoint(path, (replace(FAMILY, systems=SMALL),), **options)


def drawn(path: Path) -> torch.Tensor:
    model = Model(open_system(path, CPU, torch.float32, systems=SMALL), CPU, "svd")
    request = model.complete(REQUEST)
    return model.sample(model.condition(request), request.seeds(), request)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write("svd", tmp_path_factory.mktemp("folder") / "model")


@pytest.fixture(scope="module")
def file(place, tmp_path_factory) -> Path:
    """The same as a single file, by our conversion."""
    made = tmp_path_factory.mktemp("file") / "svd.safetensors"
    write_file(opened(place), made)
    return made


@pytest.fixture(scope="module")
def full() -> dict[str, dict[str, torch.Tensor]]:
    """Part to the tensors of the references' full-size networks, without memory."""
    system = SYSTEMS["svd"]
    config = published.text_config(system.text[0].config)
    config = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    with torch.device("meta"):
        networks = {
            "unet": UNetSpatioTemporalConditionModel.from_config(folder.unet_config(system.unet, 96, 14)),
            "vae": AutoencoderKLTemporalDecoder.from_config(published.vae_config(system.vae, 768)),
            IMAGE_ENCODER: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)),
        }
    return {part: dict(network.state_dict()) for part, network in networks.items()}


def test_our_names_are_those_of_the_full_size_networks(full):
    counts = {part: sum(t.numel() for t in tensors.values()) for part, tensors in full.items()}
    assert counts == {"unet": 1_524_623_082, "vae": 97_742_847, IMAGE_ENCODER: 632_076_800}
    theirs = [f"{part}.{name}" for part, tensors in full.items() for name in tensors]
    assert sorted(FAMILY.file_map(SYSTEMS["svd"]).ours) == sorted(theirs)


def test_names_of_a_single_file_are_those_of_its_code():
    """A sample of sgm's, one of each kind of block."""
    theirs = set(FAMILY.file_map(SYSTEMS["svd"]).theirs)
    unet, clip = "model.diffusion_model.", "conditioner.embedders.0.open_clip.model.visual."
    assert {
        f"{unet}label_emb.0.2.bias",
        f"{unet}input_blocks.8.0.time_mixer.mix_factor",
        f"{unet}input_blocks.10.0.time_stack.emb_layers.1.weight",
        f"{unet}middle_block.1.time_stack.0.ff_in.net.0.proj.weight",
        f"{unet}middle_block.1.time_pos_embed.2.bias",
        f"{unet}output_blocks.5.2.conv.weight",
        f"{unet}output_blocks.2.1.conv.weight",
        f"{unet}output_blocks.11.0.skip_connection.weight",
        f"{clip}proj",
        f"{clip}class_embedding",
        f"{clip}transformer.resblocks.31.attn.in_proj_weight",
        "first_stage_model.decoder.mid.block_2.mix_factor",
        "first_stage_model.decoder.up.3.block.2.time_stack.out_layers.3.weight",
        "first_stage_model.decoder.conv_out.time_mix_conv.bias",
        "conditioner.embedders.3.encoder.quant_conv.weight",
        "conditioner.embedders.3.encoder.encoder.mid.attn_1.q.weight",
    } <= theirs


def single(full: dict) -> dict[str, torch.Tensor]:
    ours = {f"{part}.{name}": tensor for part, named in full.items() for name, tensor in named.items()}
    return dict(FAMILY.file_map(SYSTEMS["svd"]).to_theirs(ours))


def test_files_and_networks_are_told_apart(full):
    file = single(full)
    cut = {
        name.removeprefix(keys.UNET_PREFIX): tensor
        for name, tensor in file.items()
        if name.startswith(keys.UNET_PREFIX)
    }
    for tensors, expected in (
        (file, ("svd", "checkpoint", "original")),
        (cut, ("svd", "unet", "original")),
        (full["unet"], ("svd", "unet", "diffusers")),
        (full["vae"], ("f8c4-temporal", "vae", "diffusers")),
        (full[IMAGE_ENCODER], ("clip-vit-h", IMAGE_ENCODER, "diffusers")),
    ):
        match = identify(shapes(tensors), SIGNATURES)
        assert (match.kind, match.part, match.layout) == expected


def test_neighbours_are_refused_by_name(full):
    file = single(full)
    label = f"{keys.UNET_PREFIX}label_emb.0.0.weight"
    for width in (256, 1280):
        with pytest.raises(CheckpointError, match="SV3D"):
            identify(shapes(file | {label: torch.empty(1280, width, device="meta")}), SIGNATURES)
    pictures = {
        name: tensor for name, tensor in file.items() if "time_stack" not in name or "diffusion" in name
    }
    with pytest.raises(CheckpointError, match="decoder of pictures"):
        identify(shapes(pictures), SIGNATURES)
    stage = {name: tensor for name, tensor in file.items() if name.startswith("first_stage_model.")}
    with pytest.raises(CheckpointError, match="temporal decoder in its original names"):
        identify(shapes(stage), SIGNATURES)
    edits = {"conv_in.weight": (320, 8, 3, 3), "mid_block.resnets.0.conv1.weight": (1280, 1280, 3, 3)}
    with pytest.raises(CheckpointError, match="InstructPix2Pix"):
        identify(edits, SIGNATURES)


def all_weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(network.state_dict().items())])


def test_a_folder_comes_back_from_a_single_file_to_the_bit(agrees, place, file, tmp_path):
    again = tmp_path / "again"
    write_folder(opened(file), again)
    for part, network in NETWORKS.items():
        read, wanted = (network.from_pretrained(at / part) for at in (again, place))
        agrees("single file and back, read by the reference", part, all_weights(read), all_weights(wanted), 0,
               f"{network.__module__.split('.')[0]} {network.__name__}")  # fmt: skip
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        assert read_json(again / name) == read_json(place / name), name
    assert (again / "feature_extractor" / "preprocessor_config.json").is_file()
    pipeline = StableVideoDiffusionPipeline.from_pretrained(again)
    assert pipeline.scheduler.config.sigma_max == 700.0 and pipeline.feature_extractor is not None


def test_a_single_file_draws_what_its_folder_does(place, file):
    assert torch.equal(drawn(file), drawn(place))


def test_the_picture_is_encoded_by_the_conditioner_s_autoencoder(place, tmp_path):
    """As training was: the first stage's encoder, of other numbers here, and all that is left of CLIP is dropped."""
    path = tmp_path / "svd.safetensors"
    save_file(original(), path)
    found = opened(path)
    assert found.kind == "svd"
    reasons = set(found.dropped.values())
    assert {keys.UNUSED_ENCODER, keys.UNUSED_DECODER} <= reasons and len(reasons) == 3
    assert torch.equal(drawn(path), drawn(place))


def test_other_programs_find_an_encoder_that_gives_the_same_latents(file, tmp_path):
    """The first stage's, with the convolution after it folded in: ours of a file that has no other."""
    tensors = load_file(file)
    pruned = tmp_path / "svd.safetensors"
    save_file({n: t for n, t in tensors.items() if not n.startswith(keys.CONDITIONER)}, pruned)
    assert relative_error(drawn(pruned), drawn(file)) < 1e-5


def test_the_long_kind_is_told_by_its_name_its_notes_or_its_folder(tmp_path):
    tensors = original()
    for name, notes, kind in (
        ("svd.safetensors", {}, "svd"),
        ("svd_xt_1_1.safetensors", {}, "svd-xt"),
        ("next.safetensors", {}, "svd"),
        ("a.safetensors", {"modelspec.title": "Stable Video Diffusion XT"}, "svd-xt"),
    ):
        save_file(tensors, tmp_path / name, metadata=notes or None)
        assert opened(tmp_path / name).kind == kind
    place = write("svd-xt", tmp_path / "plain")
    assert opened(place).kind == "svd-xt"
    model = Model(open_system(place, CPU, torch.float32, systems=SMALL), CPU, "x")
    assert model.preset["frames"] == 25
    five = write("svd", tmp_path / "xt", frames=5)
    system = open_system(five, CPU, torch.float32, systems=SMALL)
    assert (system.config.kind, system.config.preset.frames) == ("svd", 5)
    with pytest.raises(CheckpointError, match="5 frames, which a single file cannot say"):
        write_file(opened(five), tmp_path / "five.safetensors")


def test_what_a_scheduler_says(tmp_path):
    place = write("svd", tmp_path / "levels", sigma_max=80.0)
    levels = open_system(place, CPU, torch.float32, systems=SMALL).levels
    assert levels.sigma_max == pytest.approx(80) and levels.sigma_min == pytest.approx(0.002)
    with pytest.raises(CheckpointError, match="noise levels are its own"):
        write_file(opened(place), tmp_path / "levels.safetensors")
    for wrong in ({"sigma_max": 0.001}, {"sigma_min": "low"}):
        place = write("svd", tmp_path / f"wrong{len(list(tmp_path.iterdir()))}", **wrong)
        with pytest.raises(CheckpointError, match="sigma_min and sigma_max"):
            open_system(place, CPU, torch.float32, systems=SMALL)
    place = write("svd", tmp_path / "epsilon", prediction_type="epsilon")
    with pytest.raises(CheckpointError, match="prediction 'epsilon'"):
        open_system(place, CPU, torch.float32, systems=SMALL)


def test_another_checkpoint_s_autoencoder_is_taken(place, tmp_path):
    other = write("svd", tmp_path / "other", seed=9)
    ours = open_system(place, CPU, torch.float32, systems=SMALL, vae=other)
    latent = torch.randn(1, 4, 3, 12, 16)
    for there, same in ((other, True), (place, False)):
        decoded = open_system(there, CPU, torch.float32, systems=SMALL).decode(latent)
        assert torch.equal(ours.decode(latent), decoded) == same


def test_conversion_says_what_it_cannot_do(place, tmp_path):
    with pytest.raises(InputError, match="kind must be one of"):
        convert(place, tmp_path / "x", kind="nothing")
