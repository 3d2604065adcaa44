"""Conversion against diffusers and transformers: small networks of every kind, written by one and read by the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers import schedulers as diffusers_schedulers
from diffusers.loaders import single_file_utils as diffusers_files
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sfumato.checkpoint.source import open_weights
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.convert import write_file, write_folder
from sfumato.families.sd import folder
from sfumato.families.sd.checkpoint import open_checkpoint
from sfumato.families.sd.shapes import SYSTEMS, System
from sfumato.nn.unet import UNetConfig
from sfumato.text.clip import ClipConfig

TEXTS = {  # width 48 is bigG's, so that diffusers can tell SDXL's two apart, as it does, by their widths
    False: ClipConfig(32, 2, 2, "quick_gelu", vocabulary=99),
    True: ClipConfig(48, 2, 3, "gelu", vocabulary=99),
}


def small(system: System, unet: UNetConfig) -> System:
    text = []
    for part in system.text:
        config = TEXTS[part.open_clip]
        projection = config.width if part.config.projection else 0
        text.append(replace(part, config=replace(config, projection=projection)))
    return replace(system, unet=unet, vae=replace(system.vae, widths=(32, 64, 64)), text=tuple(text))


def small_unet(kind: str) -> UNetConfig:
    if kind == "sdxl-refiner":
        return UNetConfig(4, (64, 64, 96), (0, 2, 0), 2, (4, 4, 6), context=48, linear=True, vector=100)
    if kind.startswith("sdxl"):
        return UNetConfig(4, (32, 64), (0, 2), 2, (2, 4), context=80, linear=True, vector=120)
    if kind.startswith("sd2"):
        return UNetConfig(4, (32, 64), (1, 0), 1, (2, 4), context=48, linear=True)
    return UNetConfig(4, (32, 64), (1, 0), 1, (4, 4), context=32, linear=False)


SMALL = {
    kind: small(
        system,
        replace(small_unet(kind), in_channels=system.unet.in_channels, time_cond=system.unet.time_cond // 8),
    )
    for kind, system in SYSTEMS.items()
}
FILES = "diffusers from_single_file"
SINGLE = [kind for kind in SMALL if not kind.endswith("-lcm")]  # kinds that have a single-file layout


def text_class(config: ClipConfig) -> type:
    return CLIPTextModelWithProjection if config.projection else CLIPTextModel


def written_by_diffusers(kind: str, place: Path, prediction: str = "epsilon", zero_snr: bool = False) -> Path:
    """A diffusers folder of the small kind with random weights, its parts saved by diffusers and transformers."""
    system = SMALL[kind]
    torch.manual_seed(3)
    UNet2DConditionModel.from_config(folder.unet_config(system.unet, 8)).save_pretrained(place / "unet")
    AutoencoderKL.from_config(folder.vae_config(system.vae, 32)).save_pretrained(place / "vae")
    for part in system.text:
        settings = folder.text_config(part.config)
        settings.pop("architectures")
        text_class(part.config)(CLIPTextConfig(**settings)).save_pretrained(place / part.name)
    scheduler = folder.scheduler_config(kind, prediction, zero_snr)
    (place / "scheduler").mkdir()
    (place / folder.SCHEDULER).write_text(json.dumps(scheduler))
    index = folder.model_index(kind, system, scheduler["_class_name"])
    (place / folder.INDEX).write_text(json.dumps(index))
    return place


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: written_by_diffusers(kind, tmp_path_factory.mktemp(kind)) for kind in SMALL}


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory) -> dict[str, Path]:
    """The same as single files, by our conversion."""
    made = {}
    for kind in SINGLE:
        place = folders[kind]
        made[kind] = tmp_path_factory.mktemp("files") / f"{kind}.safetensors"
        write_file(opened(place), made[kind])
    return made


def opened(path: Path, **options):
    return open_checkpoint(path, systems=SMALL, **options)


def modules(kind: str, place: Path) -> dict[str, torch.nn.Module]:
    """The parts of a folder as diffusers and transformers read them."""
    found = {
        "unet": UNet2DConditionModel.from_pretrained(place, subfolder="unet", torch_dtype="auto"),
        "vae": AutoencoderKL.from_pretrained(place, subfolder="vae", torch_dtype="auto"),
    }
    return found | {
        part.name: text_class(part.config).from_pretrained(place / part.name) for part in SMALL[kind].text
    }


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def all_weights(module: torch.nn.Module) -> torch.Tensor:
    """Every number of a module in the order of its names."""
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(module.state_dict().items())])


@pytest.mark.parametrize("kind", SINGLE)
def test_diffusers_reads_our_single_file_as_the_folder_it_came_from(agrees, kind, folders, files):
    place, file = folders[kind], files[kind]
    wanted = modules(kind, place)
    unet = UNet2DConditionModel.from_single_file(str(file), config=str(place), subfolder="unet")
    assert_same(unet, wanted["unet"])
    agrees("single file read back, U-Net", kind, all_weights(unet), all_weights(wanted["unet"]), 0, FILES)
    vae = AutoencoderKL.from_single_file(str(file), config=str(place), subfolder="vae")
    assert_same(vae, wanted["vae"])
    agrees("single file read back, VAE", kind, all_weights(vae), all_weights(wanted["vae"]), 0, FILES)
    tensors = load_file(file)
    for part in SMALL[kind].text:
        text = diffusers_files.create_diffusers_clip_model_from_ldm(
            text_class(part.config),
            dict(tensors),
            subfolder=part.name,
            config=str(place),
            local_files_only=True,
        )
        assert_same(text, wanted[part.name])
        agrees(
            "single file read back, text", kind, all_weights(text), all_weights(wanted[part.name]), 0, FILES
        )


@pytest.mark.parametrize("kind", SINGLE)
def test_there_and_back_is_the_same_file_to_the_byte(kind, folders, files, tmp_path):
    found = opened(files[kind])
    assert (found.kind, found.alone, found.prediction) == (kind, False, "epsilon")
    write_folder(found, tmp_path / "folder")
    back = opened(tmp_path / "folder")
    assert (back.kind, back.prediction, back.zero_snr) == (kind, "epsilon", False)
    write_file(back, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == files[kind].read_bytes()
    for name, module in modules(kind, tmp_path / "folder").items():
        assert_same(module, modules(kind, folders[kind])[name])


@pytest.mark.parametrize("kind", SMALL)
def test_diffusers_opens_the_folder_as_the_pipeline_it_is(kind, folders, files, tmp_path):
    write_folder(opened(files.get(kind, folders[kind])), tmp_path / "folder")
    tokenizers = {"tokenizer": None} | ({"tokenizer_2": None} if kind.startswith("sdxl") else {})
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "folder", **tokenizers)
    assert type(pipeline).__name__ == folder.PIPELINES[kind]
    assert pipeline.vae.config.scaling_factor == SYSTEMS[kind].vae.scaling_factor
    assert pipeline.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize(("prediction", "zero_snr"), [("epsilon", False), ("v", False), ("v", True)])
def test_the_scheduler_has_the_settings_asked_for(kind, prediction, zero_snr):
    config = folder.scheduler_config(kind, prediction, zero_snr)
    scheduler = getattr(diffusers_schedulers, config["_class_name"]).from_config(config)
    for name, value in config.items():
        assert name == "_class_name" or scheduler.config[name] == value, name
    expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    if not zero_snr:
        assert torch.allclose(scheduler.betas, expected)
    else:
        assert scheduler.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_precision_is_the_same_numbers_rounded(kind, dtype, files, tmp_path):
    write_folder(opened(files[kind]), tmp_path / "folder", dtype=dtype)
    write_file(opened(tmp_path / "folder"), tmp_path / "half.safetensors")
    whole, half = load_file(files[kind]), load_file(tmp_path / "half.safetensors")
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], tensor.to(dtype)) for name, tensor in whole.items())


def test_v_prediction_goes_there_and_back(tmp_path):
    for kind, zero_snr in (("sd1", False), ("sd2", True), ("sdxl", False), ("sdxl-inpaint", True)):
        place = written_by_diffusers(kind, tmp_path / f"{kind}{zero_snr}", "v", zero_snr)
        file = tmp_path / f"{kind}{zero_snr}.safetensors"
        write_file(opened(place), file)
        names = set(open_weights(file))
        assert ("v_pred" in names, "ztsnr" in names) == (True, zero_snr)
        found = opened(file)
        assert (found.prediction, found.zero_snr) == ("v", zero_snr)
        write_folder(found, tmp_path / f"back{kind}{zero_snr}")
        back = json.loads((tmp_path / f"back{kind}{zero_snr}" / folder.SCHEDULER).read_text())
        assert back["prediction_type"] == "v_prediction"
        assert back.get("rescale_betas_zero_snr", False) == zero_snr


def test_the_prediction_of_sd2_follows_one_bias_unless_it_is_said(files, tmp_path):
    tensors = load_file(files["sd2"])
    name = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.norm1.bias"
    for spread, prediction in ((0.05, "epsilon"), (0.2, "v")):
        signs = torch.tensor([1.0, -1.0]).repeat(len(tensors[name]) // 2)
        save_file(tensors | {name: signs * spread}, tmp_path / "sd2.safetensors")
        assert opened(tmp_path / "sd2.safetensors").prediction == prediction
        said = {"v": "epsilon", "epsilon": "v"}[prediction]
        assert opened(tmp_path / "sd2.safetensors", prediction=said).prediction == said
    assert opened(files["sd2-inpaint"]).prediction == "epsilon"


def test_what_real_files_hold_beside_the_networks_is_left_by_name(files, tmp_path):
    one = torch.zeros(1)
    extras = {
        "sd1": {
            **dict.fromkeys(["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"], one),
            **dict.fromkeys(["sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "logvar"], one),
            **dict.fromkeys(["sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"], one),
            **dict.fromkeys(["posterior_variance", "posterior_log_variance_clipped"], one),
            **dict.fromkeys(["posterior_mean_coef1", "posterior_mean_coef2", "model_ema.num_updates"], one),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
            "model_ema.diffusion_modelinput_blocks00weight": one,
            "first_stage_model.loss.logvar": one,
        },
        "sd2": {
            "cond_stage_model.model.logit_scale": one,
            "cond_stage_model.model.text_projection": torch.zeros(48, 48),
            "cond_stage_model.model.transformer.resblocks.2.ln_1.weight": one,
            "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight": one,
        },
        "sdxl": {
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
            "conditioner.embedders.1.model.logit_scale": one,
            "denoiser.sigmas": torch.zeros(1000),
        },
    }
    for kind, more in extras.items():
        more = {name: tensor.clone() for name, tensor in more.items()}
        save_file(load_file(files[kind]) | more, tmp_path / f"{kind}.safetensors")
        found = opened(tmp_path / f"{kind}.safetensors")
        assert set(found.dropped) == set(more) and all(found.dropped.values())
        write_file(found, tmp_path / f"{kind}-again.safetensors")
        assert (tmp_path / f"{kind}-again.safetensors").read_bytes() == files[kind].read_bytes()
    save_file(load_file(files["sd1"]) | {"stowaway": one}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected: stowaway$"):
        opened(tmp_path / "x.safetensors")


def test_spellings_of_other_tools_are_the_same_tensors(files, folders, tmp_path):
    sdxl, sd1 = load_file(files["sdxl"]), load_file(files["sd1"])
    head = "conditioner.embedders.1.model.text_projection"
    other = {name: tensor for name, tensor in sdxl.items() if name != head}
    other[f"{head}.weight"] = sdxl[head].T.contiguous()  # scripts/convert_diffusers_to_original_sdxl.py
    head = "cond_stage_model.transformer."  # transformers before 4.0 and since 5.6
    bare = {name.replace(f"{head}text_model.", head): tensor for name, tensor in sd1.items()}
    for name, tensor in bare.items():
        if ".mid.attn_1." in name and tensor.ndim == 4:
            bare[name] = tensor[:, :, 0, 0].contiguous()  # some tools write the linear layer that it is
    assert sum(bare[name].ndim == 2 for name in bare if ".mid.attn_1." in name) == 8
    for kind, tensors in (("sdxl", other), ("sd1", bare)):
        save_file(tensors, tmp_path / f"{kind}.safetensors")
        write_file(opened(tmp_path / f"{kind}.safetensors"), tmp_path / f"{kind}-again.safetensors")
        assert (tmp_path / f"{kind}-again.safetensors").read_bytes() == files[kind].read_bytes()


def test_a_vae_folder_with_the_names_before_diffusers_017(folders, tmp_path):
    place = tmp_path / "old"
    write_folder(opened(folders["sd1"]), place)
    file = place / "vae" / "diffusion_pytorch_model.safetensors"
    new, old = load_file(file), {}
    for name, tensor in new.items():
        for ours, theirs in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
        old[name] = tensor
    assert sum(name not in new for name in old) == 16
    save_file(old, file)
    assert_same(
        AutoencoderKL.from_pretrained(place, subfolder="vae"),
        AutoencoderKL.from_pretrained(folders["sd1"], subfolder="vae"),
    )
    vae = opened(place).parts["vae"]
    assert set(vae) == set(new) and all(torch.equal(vae[name], tensor) for name, tensor in new.items())


def test_a_network_alone_keeps_to_itself(folders, files, tmp_path):
    for kind in ("sd1", "sdxl-refiner"):
        unet = folders[kind] / "unet"
        found = opened(unet)
        assert (found.kind, found.alone, list(found.parts)) == (kind, True, ["unet"])
        write_file(found, tmp_path / f"{kind}.safetensors")
        read = UNet2DConditionModel.from_single_file(
            str(tmp_path / f"{kind}.safetensors"), config=str(folders[kind]), subfolder="unet"
        )
        assert_same(read, UNet2DConditionModel.from_pretrained(unet))
        bare = {
            name.removeprefix("model.diffusion_model."): tensor
            for name, tensor in load_file(tmp_path / f"{kind}.safetensors").items()
        }
        save_file(bare, tmp_path / "bare.safetensors")
        write_folder(opened(tmp_path / "bare.safetensors"), tmp_path / kind)
        assert_same(
            UNet2DConditionModel.from_pretrained(tmp_path / kind), UNet2DConditionModel.from_pretrained(unet)
        )


def test_a_folder_keeps_what_stands_beside_its_weights(folders, tmp_path):
    place = written_by_diffusers("sdxl", tmp_path / "from")
    (place / "tokenizer").mkdir()
    (place / "tokenizer" / "merges.txt").write_text("a b\n")
    (place / "tokenizer" / "code.py").write_text("raise SystemExit\n")
    config = json.loads((place / "unet" / "config.json").read_text()) | {"sample_size": 96}
    (place / "unet" / "config.json").write_text(json.dumps(config))
    write_folder(opened(place, prediction="v"), tmp_path / "to")
    assert (tmp_path / "to" / "tokenizer" / "merges.txt").read_text() == "a b\n"
    assert not (tmp_path / "to" / "tokenizer" / "code.py").exists()
    assert json.loads((tmp_path / "to" / "unet" / "config.json").read_text())["sample_size"] == 96
    assert json.loads((tmp_path / "to" / folder.SCHEDULER).read_text())["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("kind", ["sd1-lcm", "sdxl-lcm"])
def test_a_u_net_that_is_told_the_guidance_scale_stays_in_a_folder(kind, folders, tmp_path):
    found = opened(folders[kind])
    assert found.kind == kind
    with pytest.raises(CheckpointError, match="keep it as a folder"):
        write_file(found, tmp_path / "x.safetensors")
    write_folder(found, tmp_path / "again")
    for name, module in modules(kind, tmp_path / "again").items():
        assert_same(module, modules(kind, folders[kind])[name])


def test_a_scale_that_a_single_file_cannot_say_stays_in_a_folder(tmp_path):
    place = written_by_diffusers("sd1", tmp_path / "from")
    config = json.loads((place / "vae" / "config.json").read_text()) | {"scaling_factor": 0.5}
    (place / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"scaling_factor 0\.5"):
        write_file(opened(place), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_tensor_of_another_shape_is_named_before_anything_is_written(files, tmp_path):
    tensors = load_file(files["sdxl"])
    for name, ours in (
        ("model.diffusion_model.middle_block.0.in_layers.2.weight", "mid_block.resnets.0.conv1.weight"),
        ("conditioner.embedders.1.model.ln_final.weight", "text_model.final_layer_norm.weight"),
        ("first_stage_model.decoder.conv_in.bias", "decoder.conv_in.bias"),
    ):
        save_file(tensors | {name: torch.zeros(7)}, tmp_path / "odd.safetensors")
        for write in (write_file, write_folder):
            with pytest.raises(CheckpointError, match=rf"tensor '{ours}' of the \w+ is \(7,\) where \("):
                write(opened(tmp_path / "odd.safetensors"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.safetensors"]


def test_arguments_that_do_not_fit_are_refused(folders):
    with pytest.raises(InputError, match="is of sd1, not of sdxl"):
        opened(folders["sd1"], kind="sdxl")
    with pytest.raises(InputError, match="kind must be one of sd1"):
        opened(folders["sd1"], kind="sd9")
    with pytest.raises(InputError, match="prediction must be epsilon or v"):
        opened(folders["sd1"], prediction="flow")
