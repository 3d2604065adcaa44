"""Names of Stable Diffusion tensors against diffusers: its full-size networks without memory, and its converters."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    SD3ControlNetModel,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils as diffusers_files
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from helpers import hollow
from sfumato.checkpoint.detect import identify
from sfumato.checkpoint.rules import shapes
from sfumato.errors import CheckpointError, InputError
from sfumato.families import checkpoint_families
from sfumato.families.published.checkpoint import all_signatures
from sfumato.families.sd import folder, keys
from sfumato.families.sd.checkpoint import open_checkpoint
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.shapes import SYSTEMS

PARAMETERS = {  # of the U-Nets, as they are published
    "sd1": 859_520_964,
    "sd1-inpaint": 859_535_364,
    "sd1-lcm": 859_520_964 + 320 * 256,
    "sd2": 865_910_724,
    "sd2-inpaint": 865_925_124,
    "sdxl": 2_567_463_684,
    "sdxl-inpaint": 2_567_478_084,
    "sdxl-lcm": 2_567_463_684 + 320 * 256,
    "sdxl-refiner": 2_259_526_660,
}
SIGNATURES = tuple(all_signatures(checkpoint_families()))


def text_encoder(config):
    settings = folder.text_config(config)
    kind = CLIPTextModelWithProjection if config.projection else CLIPTextModel
    settings.pop("architectures")
    return kind(CLIPTextConfig(**settings))


def published(name: str) -> str:
    """A text encoder's tensor as published folders name it, whichever transformers is installed."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


@pytest.fixture(scope="module")
def full() -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """System and part to the tensors of diffusers' full-size network, without memory."""
    built = {}
    with torch.device("meta"):
        for kind, system in SYSTEMS.items():
            parts = {
                "unet": UNet2DConditionModel.from_config(folder.unet_config(system.unet, 64)),
                "vae": AutoencoderKL.from_config(folder.vae_config(system.vae, 512)),
            }
            parts |= {part.name: text_encoder(part.config) for part in system.text}
            built[kind] = {
                part: {
                    (published(name) if part.startswith("text") else name): tensor
                    for name, tensor in module.state_dict().items()
                    if "position_ids" not in name
                }
                for part, module in parts.items()
            }
    return built


# diffusers' converter knows no name for the guidance scale's projection
ORIGINAL = [kind for kind in SYSTEMS if not kind.endswith("-lcm")]


def original(kind: str, full: dict) -> dict[str, torch.Tensor]:
    """A complete single file with the tensors' full-size shapes, as training code wrote it."""
    ours = {f"{part}.{name}": tensor for part, named in full[kind].items() for name, tensor in named.items()}
    return dict(FAMILY.file_map(SYSTEMS[kind]).to_theirs(ours))


@pytest.mark.parametrize("kind", SYSTEMS)
def test_our_names_are_those_of_the_full_size_networks(kind, full):
    unet = full[kind]["unet"]
    assert sum(tensor.numel() for tensor in unet.values()) == PARAMETERS[kind]
    ours = FAMILY.file_map(SYSTEMS[kind]).ours
    theirs = [f"{part}.{name}" for part, named in full[kind].items() for name in named]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("kind", ORIGINAL)
def test_diffusers_converts_the_same_tensors_to_the_same_names(kind, full):
    """Full-size names, small tensors that all differ; theirs are converted by diffusers and compared with ours."""
    system = SYSTEMS[kind]
    ours: dict[str, dict[str, torch.Tensor]] = {}
    for part, named in full[kind].items():
        ours[part] = {
            name: torch.full((2, 2) if tensor.ndim > 1 else (2,), float(n)) + torch.arange(2.0)
            for n, (name, tensor) in enumerate(named.items())
        }
    flat = {f"{part}.{name}": tensor for part, named in ours.items() for name, tensor in named.items()}
    file = dict(FAMILY.file_map(system).to_theirs(flat))

    unet_config = dict(UNet2DConditionModel.from_config(folder.unet_config(SMALL_UNETS[kind], 64)).config)
    theirs = diffusers_files.convert_ldm_unet_checkpoint(dict(file), unet_config)
    assert_same(theirs, ours["unet"])
    theirs = diffusers_files.convert_ldm_vae_checkpoint(dict(file), folder.vae_config(system.vae, 512))
    assert_same(theirs, ours["vae"])
    for part in system.text:
        if part.open_clip:
            model = SimpleNamespace(config=CLIPTextConfig(hidden_size=2, num_attention_heads=1))
            theirs = diffusers_files.convert_open_clip_checkpoint(model, dict(file), part.prefixes[0])
        else:
            theirs = diffusers_files.convert_ldm_clip_checkpoint(dict(file))
        assert_same(theirs, ours[part.name])


# diffusers' converter reads three fields of a U-Net's config, and these say the same in a network of few channels
SMALL_UNETS = {
    kind: replace(
        system.unet,
        channels=tuple(32 for _ in system.unet.channels),
        heads=tuple(2 for _ in system.unet.channels),
        depths=tuple(min(depth, 1) for depth in system.unet.depths),
        mid_depth=1,
    )
    for kind, system in SYSTEMS.items()
}


def assert_same(a: dict, b: dict) -> None:
    assert sorted(a) == sorted(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_file_of_every_kind_is_recognised(kind, full):
    match = identify(shapes(original(kind, full)), SIGNATURES)
    assert (match.kind, match.part, match.layout) == (kind, "checkpoint", "original")
    assert match.traits == {}


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_full_size_file_is_opened_without_reading_it(kind, full, tmp_path):
    found = open_checkpoint(hollow(original(kind, full), tmp_path / "model.safetensors"))
    assert (found.kind, found.prediction, found.alone) == (kind, "epsilon", False)
    assert sorted(found.parts) == sorted(full[kind])
    for part, named in full[kind].items():
        assert shapes(found.parts[part]) == shapes(named)


def test_a_text_encoder_alone_takes_its_place_in_the_kind_that_is_said(full, tmp_path):
    file = hollow(full["sdxl"]["text_encoder_2"], tmp_path / "clip_g.safetensors")
    assert open_checkpoint(file).kind == "openclip-bigg"
    assert list(open_checkpoint(file, kind="sdxl").parts) == ["text_encoder_2"]
    with pytest.raises(InputError, match="is of openclip-bigg, not of sd1"):
        open_checkpoint(file, kind="sd1")


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_file_without_vae_or_text_is_recognised(kind, full):
    file = original(kind, full)
    alone = {name: t for name, t in file.items() if name.startswith(keys.UNET_PREFIX)}
    match = identify(shapes(alone), SIGNATURES)
    assert (match.kind, match.part) == (kind, "checkpoint")
    assert FAMILY.prefixes(SYSTEMS[kind], alone) == {"unet": keys.UNET_PREFIX}
    bare = {name.removeprefix(keys.UNET_PREFIX): t for name, t in alone.items()}
    match = identify(shapes(bare), SIGNATURES)
    assert (match.kind, match.part, match.layout, match.prefix) == (kind, "unet", "original", "")


@pytest.mark.parametrize("kind", SYSTEMS)
def test_each_part_of_a_folder_is_recognised(kind, full):
    for part, named in full[kind].items():
        match = identify(shapes(named), SIGNATURES)
        expected = {"unet": (kind, "unet"), "vae": ("f8c4", "vae")}.get(part)
        if expected is None:
            width = named["text_model.final_layer_norm.weight"].shape[0]
            expected = ({768: "clip-l", 1024: "openclip-h", 1280: "openclip-bigg"}[width], "text_encoder")
        assert (match.kind, match.part, match.layout) == (*expected, "diffusers")


def test_a_vae_alone_does_not_say_whose_it_is(full):
    for kind in ("sd1", "sdxl"):
        file = original(kind, full)
        vae = {name: t for name, t in file.items() if name.startswith(keys.VAE_PREFIX)}
        for prefix in (keys.VAE_PREFIX, "vae.", ""):
            named = {prefix + name.removeprefix(keys.VAE_PREFIX): t for name, t in vae.items()}
            match = identify(shapes(named), SIGNATURES)
            assert (match.kind, match.part, match.layout, match.prefix) == ("f8c4", "vae", "original", prefix)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "sdxl-inpaint", "sdxl-refiner"])
@pytest.mark.parametrize(
    ("markers", "traits"),
    [(("v_pred",), {"prediction": "v"}), (("v_pred", "ztsnr"), {"prediction": "v", "zero_snr": True})],
)
def test_markers_of_v_prediction_are_read(kind, markers, traits, full):
    file = original(kind, full) | {name: torch.zeros(0) for name in markers}
    match = identify(shapes(file), SIGNATURES)
    assert (match.kind, match.traits) == (kind, traits)
    report = FAMILY.file_map(SYSTEMS[kind]).match(file)
    assert report.complete and set(report.dropped) == set(markers)


def refused(named: dict) -> str:
    with pytest.raises(CheckpointError, match="this is") as caught:
        identify(named, SIGNATURES)
    return str(caught.value).split("this is ")[1]


def test_neighbours_in_the_original_layout_are_refused_by_name(full):
    unet = keys.UNET_PREFIX
    sd1, sd2, sdxl = (shapes(original(kind, full)) for kind in ("sd1", "sd2", "sdxl"))
    assert refused(sd1 | {"control_model.time_embed.0.weight": (1280, 320)}).startswith("a ControlNet")
    assert refused(
        {"time_embed.0.weight": (1280, 320), "input_hint_block.0.weight": (16, 3, 3, 3)}
    ).startswith("a ControlNet")
    assert refused(sd1 | {f"{unet}input_blocks.0.0.weight": (320, 8, 3, 3)}).startswith("an InstructPix2Pix")
    assert refused(sdxl | {f"{unet}input_blocks.0.0.weight": (320, 8, 3, 3)}).startswith("an InstructPix2Pix")
    assert refused(sd2 | {f"{unet}input_blocks.0.0.weight": (320, 5, 3, 3)}).startswith("a depth-guided SD 2")
    assert refused(sd2 | {f"{unet}label_emb.0.0.weight": (1280, 2048)}).startswith("an unCLIP checkpoint")
    assert refused(sdxl | {"edm_mean": (4,), "edm_std": (4,)}).startswith("a Playground v2.5")
    assert refused(sdxl | {"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}).startswith("a CosXL")
    assert refused(sd1 | {"cc_projection.weight": (768, 772)}).startswith("a Zero123")
    fewer = {n: s for n, s in sdxl.items() if not any(f".transformer_blocks.{i}." in n for i in range(4, 10))}
    assert refused(fewer).startswith("a distilled SDXL")


def test_neighbours_in_the_diffusers_layout_are_refused_by_name():
    with torch.device("meta"):
        built = {
            "an SD3 ControlNet": SD3ControlNetModel(
                num_layers=2, num_attention_heads=2, joint_attention_dim=128, caption_projection_dim=128
            ),
            "a ControlNet": ControlNetModel(),
        }
    for start, module in built.items():
        assert refused(shapes(module.state_dict())).startswith(start)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a",
        "lora_unet_mid_block_attentions_0_proj_in.lokr_w1",
    ],
)
def test_a_lora_is_refused_as_one(name):
    assert refused({name: (4, 320), name.replace("down", "up"): (320, 4)}).startswith("a LoRA")


def test_what_is_nearly_known_is_told_apart_by_its_tensors(full):
    def told(named: dict) -> str:
        with pytest.raises(CheckpointError, match=r"^x\.st is of no known kind: ") as caught:
            identify(named, SIGNATURES, source="x.st")
        return str(caught.value).split("kind: ")[1]

    wide = shapes(full["sdxl"]["unet"]) | {"add_embedding.linear_1.weight": (1280, 2000)}
    assert told(wide) == (
        "the nearest is sdxl unet (diffusers names), but add_embedding.linear_1.weight is (1280, 2000) where "
        "(1280, 2816) is right"
    )
    file = shapes(original("sd1", full))
    del file[f"{keys.UNET_PREFIX}out.2.weight"]
    assert told(file) == (
        "the nearest is sd1 (original names), but model.diffusion_model.out.2.weight is missing"
    )
    assert told({"b": (1,), "a": (2,)}) == "none of its 2 tensors is one we look for; the first are a, b"
    assert told({}).startswith("none of its 0 tensors")
