"""Names of Stable Diffusion 3's tensors against diffusers: its full-size networks without memory, and its converter."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders import single_file_utils as diffusers_files
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel
from transformers import T5Config as TheirT5

from helpers import hollow
from sfumato.checkpoint.detect import identify
from sfumato.checkpoint.rules import shapes
from sfumato.errors import CheckpointError, InputError
from sfumato.families import checkpoint_families
from sfumato.families.published import folder as published
from sfumato.families.published.checkpoint import all_signatures, open_checkpoint
from sfumato.families.published.keys import DENOISER_PREFIX
from sfumato.families.sd3 import folder, keys
from sfumato.families.sd3.family import FAMILY
from sfumato.families.sd3.shapes import SAME_TENSORS, SYSTEMS
from sfumato.text.t5 import T5Config

PARAMETERS = {  # of the transformers without the table of positions, and the table's, as they are published
    "sd3-medium": (2_028_328_000, 56_623_104),
    "sd3.5-medium": (2_243_171_520, 226_492_416),
    "sd3.5-large": (8_056_627_520, 89_653_248),
}
KINDS = list(PARAMETERS)
FAMILIES = checkpoint_families()
SIGNATURES = tuple(all_signatures(FAMILIES))
TEXTS = {"text_encoder": "clip-l", "text_encoder_2": "openclip-bigg", "text_encoder_3": "t5-xxl"}


def with_prefix(name: str) -> str:
    """A CLIP's tensor as published folders name it, whichever transformers is installed."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def text_encoder(config):
    settings = published.text_config(config)
    settings.pop("architectures")
    if isinstance(config, T5Config):
        return T5EncoderModel(TheirT5(**settings))
    return CLIPTextModelWithProjection(CLIPTextConfig(**settings))


@pytest.fixture(scope="module")
def full() -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """System and part to the tensors of diffusers' and transformers' full-size networks, without memory."""
    built = {}
    with torch.device("meta"):
        texts = {part.name: text_encoder(part.config) for part in SYSTEMS["sd3-medium"].text}
        for kind in KINDS:
            system = SYSTEMS[kind]
            parts = {
                "transformer": SD3Transformer2DModel.from_config(
                    folder.transformer_config(system.transformer, 128)
                ),
                "vae": AutoencoderKL.from_config(published.vae_config(system.vae, 1024)),
            } | texts
            built[kind] = {
                part: {
                    (name if part in ("transformer", "vae", "text_encoder_3") else with_prefix(name)): tensor
                    for name, tensor in module.state_dict().items()
                    if name not in ("encoder.embed_tokens.weight", "text_model.embeddings.position_ids")
                }
                for part, module in parts.items()
            }
    return built


def original(kind: str, full: dict) -> dict[str, torch.Tensor]:
    """A complete single file with the tensors' full-size shapes."""
    ours = {f"{part}.{name}": tensor for part, named in full[kind].items() for name, tensor in named.items()}
    return dict(FAMILY.file_map(SYSTEMS[kind]).to_theirs(ours))


@pytest.mark.parametrize("kind", KINDS)
def test_our_names_are_those_of_the_full_size_networks(kind, full):
    transformer = full[kind]["transformer"]
    weights, table = PARAMETERS[kind]
    assert transformer["pos_embed.pos_embed"].numel() == table
    assert sum(tensor.numel() for tensor in transformer.values()) == weights + table
    theirs = [f"{part}.{name}" for part, named in full[kind].items() for name in named]
    assert sorted(FAMILY.file_map(SYSTEMS[kind]).ours) == sorted(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_converts_the_same_tensors_to_the_same_names(kind, full):
    """Full-size names, small tensors that all differ, and whose halves and thirds do."""
    width = 6
    ours = {}
    for n, (name, tensor) in enumerate(full[kind]["transformer"].items()):
        rows = 2 * width if "norm_out" in name or "norm1_context" in name else width
        shape = (rows, 2) if tensor.ndim > 1 else (rows,)
        ours[name] = (
            torch.full(shape, float(n)) + torch.arange(float(rows)).view(-1, *[1] * (len(shape) - 1)) / 64
        )
    ours["context_embedder.weight"] = torch.ones(width, 2)  # diffusers takes the width from it
    theirs = keys.transformer_map(SYSTEMS[kind].transformer).to_theirs(ours)
    prefixed = {f"{DENOISER_PREFIX}{name}": tensor for name, tensor in theirs.items()}
    converted = diffusers_files.convert_sd3_transformer_checkpoint_to_diffusers(prefixed)
    assert sorted(converted) == sorted(ours)
    for name, tensor in converted.items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_or_without_encoders_and_autoencoder_is_recognised(kind, full):
    file = original(kind, full)
    match = identify(shapes(file), SIGNATURES)
    assert (match.kind, match.part, match.layout) == (kind, "checkpoint", "original")
    for left_out in (
        ("text_encoders.",),
        ("text_encoders.t5xxl.",),
        ("text_encoders.", "first_stage_model."),
    ):
        some = {name: tensor for name, tensor in file.items() if not name.startswith(left_out)}
        match = identify(shapes(some), SIGNATURES)
        assert (match.kind, match.part) == (kind, "checkpoint")
    bare = {
        name.removeprefix(DENOISER_PREFIX): t for name, t in file.items() if name.startswith(DENOISER_PREFIX)
    }
    match = identify(shapes(bare), SIGNATURES)
    assert (match.kind, match.part, match.layout) == (kind, "transformer", "original")


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_of_a_folder_is_recognised(kind, full):
    expected = {"transformer": (kind, "transformer"), "vae": ("f8c16", "vae")}
    for part, named in full[kind].items():
        match = identify(shapes(named), SIGNATURES)
        right = expected.get(part, (TEXTS.get(part), "text_encoder"))
        assert (match.kind, match.part, match.layout) == (*right, "diffusers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_size_file_is_opened_without_reading_it(kind, full, tmp_path):
    found = open_checkpoint(hollow(original(kind, full), tmp_path / "model.safetensors"), FAMILIES)
    assert (found.kind, found.prediction, found.alone) == (kind, "flow", False)
    assert sorted(found.parts) == sorted(full[kind])
    for part, named in full[kind].items():
        assert shapes(found.parts[part]) == shapes(named)


def test_the_distilled_one_is_known_by_its_name_or_what_is_said(full, tmp_path):
    [(turbo, large)] = SAME_TENSORS.items()
    alone = {n: t for n, t in original(large, full).items() if n.startswith(DENOISER_PREFIX)}
    assert open_checkpoint(hollow(alone, tmp_path / "sd3.5_large.safetensors"), FAMILIES).kind == large
    file = hollow(alone, tmp_path / "sd3.5_large_turbo.safetensors")
    assert open_checkpoint(file, FAMILIES).kind == turbo
    assert open_checkpoint(file, FAMILIES, kind=large).kind == large
    with pytest.raises(InputError, match=r"is of sd3\.5-large-turbo, not of sd3-medium"):
        open_checkpoint(file, FAMILIES, kind="sd3-medium")


def test_parts_alone_take_their_places_in_the_kind_that_is_said(full, tmp_path):
    for part, alone in TEXTS.items():
        file = hollow(full["sd3-medium"][part], tmp_path / f"{part}.safetensors")
        assert open_checkpoint(file, FAMILIES).kind == alone
        placed = open_checkpoint(file, FAMILIES, kind="sd3-medium")
        assert list(placed.parts) == [part] and shapes(placed.parts[part]) == shapes(full["sd3-medium"][part])
    vae = hollow(full["sd3-medium"]["vae"], tmp_path / "vae.safetensors")
    assert open_checkpoint(vae, FAMILIES).kind == "f8c16"
    assert open_checkpoint(vae, FAMILIES, kind="sd3.5-large").system is SYSTEMS["sd3.5-large"]
    with pytest.raises(InputError, match="is of f8c16, not of sdxl"):
        open_checkpoint(vae, FAMILIES, kind="sdxl")
    with pytest.raises(InputError, match="is of t5-xxl, not of sd1"):
        open_checkpoint(tmp_path / "text_encoder_3.safetensors", FAMILIES, kind="sd1")


def test_files_keep_t5_s_table_under_one_name_or_two(full, tmp_path):
    named = dict(full["sd3-medium"]["text_encoder_3"])
    both = named | {"encoder.embed_tokens.weight": named["shared.weight"]}
    twin = {n: t for n, t in both.items() if n != "shared.weight"}
    for number, tensors in enumerate((named, both, twin)):
        file = hollow(tensors, tmp_path / f"{number}.safetensors")
        found = open_checkpoint(file, FAMILIES, kind="sd3-medium")
        assert shapes(found.parts["text_encoder_3"]) == shapes(named)


def test_what_is_nearly_one_is_told_apart_by_its_tensors(full):
    def told(named: dict) -> str:
        with pytest.raises(CheckpointError, match=r"^x\.st ") as caught:
            identify(named, SIGNATURES, source="x.st")
        return str(caught.value)

    file = shapes(original("sd3-medium", full))
    wide = file | {f"{DENOISER_PREFIX}pos_embed": (1, 100, 1536)}
    assert told(wide) == (
        "x.st is of no known kind: the nearest is sd3-medium (original names), but model.diffusion_model.pos_embed is "
        "(1, 100, 1536) where (1, 36864, 1536) is right"
    )
    deeper = file | {f"{DENOISER_PREFIX}joint_blocks.24.x_block.attn.qkv.weight": (4608, 1536)}
    assert "joint_blocks.24.x_block.attn.qkv.weight does not belong there" in told(deeper)
    flux = {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}
    assert "this is a FLUX checkpoint" in told(flux)
    control = {"controlnet_blocks.0.weight": (1536, 1536), "pos_embed_input.proj.weight": (1536, 17, 2, 2)}
    assert "this is an SD3 ControlNet" in told(shapes(full["sd3-medium"]["transformer"]) | control)
