"""Stable Diffusion 3 in both layouts, written by ours and read by diffusers, and the reverse: equal to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders import single_file_utils as diffusers_files
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from sfumato.errors import CheckpointError
from sfumato.families.published.checkpoint import open_checkpoint
from sfumato.families.published.convert import write_file, write_folder
from sfumato.families.sd3.family import FAMILY
from sfumato.storage import read_json, write_json
from small_sd3 import SMALL, tensors_of, write

FILES = "diffusers from_single_file"
KINDS = ["sd3-medium", "sd3.5-medium", "sd3.5-large"]
NETWORKS = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}


def opened(path: Path, **options):
    return open_checkpoint(path, (replace(FAMILY, systems=SMALL),), **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: write(kind, tmp_path_factory.mktemp(kind) / "model") for kind in KINDS}


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory) -> dict[str, Path]:
    """The same as single files, by our conversion."""
    made = {}
    for kind, place in folders.items():
        made[kind] = tmp_path_factory.mktemp("files") / f"{kind}.safetensors"
        write_file(opened(place), made[kind])
    return made


def module(place: Path, part: str) -> torch.nn.Module:
    return NETWORKS[part].from_pretrained(place / part, torch_dtype="auto")


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def all_weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(network.state_dict().items())])


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_our_single_file_as_the_folder_it_came_from(agrees, kind, folders, files):
    place, file = folders[kind], files[kind]
    for part, name in (("transformer", "transformer"), ("vae", "VAE")):
        read = NETWORKS[part].from_single_file(str(file), config=str(place), subfolder=part)
        wanted = module(place, part)
        assert_same(read, wanted)
        agrees(f"single file read back, {name}", kind, all_weights(read), all_weights(wanted), 0, FILES)
    torch.manual_seed(0)
    config = SMALL[kind].transformer
    x, context = torch.randn(1, 16, 12, 8), torch.randn(1, 5, config.context)
    told = {"pooled_projections": torch.randn(1, config.pooled), "timestep": torch.tensor([300.0])}
    with torch.no_grad():
        a, b = (
            network(x, context, **told).sample
            for network in (
                SD3Transformer2DModel.from_single_file(str(file), config=str(place), subfolder="transformer"),
                module(place, "transformer"),
            )
        )
    agrees("single file read back, an answer", kind, a, b, 1e-6, FILES)  # of equal weights, up to rounding


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_the_text_encoders_of_our_single_file(kind, folders, files):
    place, tensors = folders[kind], load_file(files[kind])
    for part in ("text_encoder", "text_encoder_2"):
        read = diffusers_files.create_diffusers_clip_model_from_ldm(
            NETWORKS[part], dict(tensors), subfolder=part, config=str(place), local_files_only=True
        )
        assert_same(read, module(place, part))
    t5 = diffusers_files.convert_sd3_t5_checkpoint_to_diffusers(dict(tensors))
    wanted = module(place, "text_encoder_3").state_dict()
    assert set(wanted) - set(t5) <= {"encoder.embed_tokens.weight"}  # the same table, which transformers ties
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in t5.items())


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_file_to_the_byte(kind, folders, files, tmp_path):
    found = opened(files[kind])
    assert (found.kind, found.alone, found.prediction) == (kind, False, "flow")
    written = write_folder(found, tmp_path / "folder")
    assert list(written.dropped) == ["tokenizer_3/*"]  # T5's, which neither the file nor the package has
    write_file(opened(tmp_path / "folder"), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == files[kind].read_bytes()
    for part in NETWORKS:
        assert_same(module(tmp_path / "folder", part), module(folders[kind], part))


def test_a_folder_s_own_tokenizers_go_with_it_and_diffusers_opens_what_we_write(folders, tmp_path):
    written = write_folder(opened(folders["sd3-medium"]), tmp_path / "folder", dtype=torch.bfloat16)
    assert not written.dropped and (tmp_path / "folder" / "tokenizer_3" / "tokenizer.json").is_file()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder", tokenizer_3=None)
    assert pipeline.vae.config.shift_factor == 0.0609 and pipeline.scheduler.config.shift == 3.0
    assert pipeline.transformer.config.qk_norm is None
    # a file without text encoders becomes a folder that says so
    only = {
        n: t
        for n, t in load_file(tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors").items()
    }
    assert all(tensor.dtype == torch.bfloat16 for tensor in only.values())


def test_a_file_without_encoders_becomes_a_folder_that_says_so(files, tmp_path):
    some = {
        n: t for n, t in load_file(files["sd3.5-large"]).items() if not n.startswith("text_encoders.t5xxl.")
    }
    save_file(some, tmp_path / "some.safetensors")
    write_folder(opened(tmp_path / "some.safetensors"), tmp_path / "folder")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "folder", text_encoder_3=None, tokenizer_3=None
    )
    assert pipeline.text_encoder_3 is None and pipeline.text_encoder_2 is not None


def test_a_file_without_clip_l_s_projection_has_that_of_no_change(files, tmp_path):
    """As the published ones."""
    tensors = load_file(files["sd3-medium"])
    del tensors["text_encoders.clip_l.transformer.text_projection.weight"]
    tensors["text_encoders.clip_l.logit_scale"] = torch.zeros(())
    save_file(tensors, tmp_path / "plain.safetensors")
    found = opened(tmp_path / "plain.safetensors")
    assert list(found.dropped) == ["text_encoders.clip_l.logit_scale"]
    write_folder(found, tmp_path / "folder")
    back = module(tmp_path / "folder", "text_encoder").state_dict()
    assert torch.equal(back["text_projection.weight"], torch.eye(32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_precision_is_the_same_numbers_rounded(dtype, files, tmp_path):
    write_folder(opened(files["sd3.5-medium"]), tmp_path / "folder", dtype=dtype)
    write_file(opened(tmp_path / "folder"), tmp_path / "half.safetensors")
    whole, half = load_file(files["sd3.5-medium"]), load_file(tmp_path / "half.safetensors")
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], tensor.to(dtype)) for name, tensor in whole.items())


def test_eight_bit_floats_are_read_and_written_as_they_are(files, tmp_path):
    """As published with T5 in float8_e4m3fn; halves are swapped and thirds split in it too."""
    eight = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(files["sd3-medium"]).items()}
    save_file(eight, tmp_path / "eight.safetensors")
    write_folder(opened(tmp_path / "eight.safetensors"), tmp_path / "folder")
    write_file(opened(tmp_path / "folder"), tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[n].view(torch.uint8), t.view(torch.uint8)) for n, t in eight.items())


def test_what_a_single_file_cannot_say_is_refused(tmp_path):
    place = write("sd3-medium", tmp_path / "shifted", shift=6.0)
    with pytest.raises(CheckpointError, match="its noise levels have the shift 6"):
        write_file(opened(place), tmp_path / "x.safetensors")
    place = write("sd3-medium", tmp_path / "scaled")
    write_json(
        place / "vae" / "config.json", read_json(place / "vae" / "config.json") | {"shift_factor": 0.5}
    )
    with pytest.raises(CheckpointError, match=r"scales latents in its own way.*shift_factor 0.5"):
        write_file(opened(place), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_small_ones_are_what_they_are_called(folders):
    for kind, place in folders.items():
        found = opened(place)
        assert found.kind == kind
        wanted = tensors_of(kind)
        for part, tensors in found.parts.items():
            assert all(torch.equal(tensor, wanted[part][name]) for name, tensor in tensors.items())
