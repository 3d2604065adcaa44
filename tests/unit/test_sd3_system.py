"""`sfumato` with a Stable Diffusion 3: what it draws, keeps in memory, plans, inspects and refuses."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import hollow
from sfumato import load, planning
from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.cli.app import run
from sfumato.drawing.script import check_texts
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.openers import blank
from sfumato.families.sd.shapes import SYSTEMS as OTHERS
from sfumato.families.sd3.family import FAMILY
from sfumato.families.sd3.shapes import SYSTEMS
from sfumato.families.sd3.system import open_system
from sfumato.generate import Model
from sfumato.memory import OFFLOADS, LiveBytes
from sfumato.receipts.provenance import read_recipe
from sfumato.types import Request
from small_sd import SMALL as SMALL_OTHERS
from small_sd import write as write_other
from small_sd3 import SMALL, t5_tokenizer, write

CPU = torch.device("cpu")
REQUEST = Request("a red (cube:1.2)", negative="blurry", seed=3, steps=2, size=(64, 96))
LIGHT = ["--steps", "2", "--size", "32", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """kind → the folder of a small model with random weights."""
    known: dict[str, Path] = {}

    def place(kind: str) -> Path:
        if kind not in known:
            known[kind] = write(kind, tmp_path_factory.mktemp("small") / kind)
        return known[kind]

    return place


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The small kinds in place of the published ones, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    for systems, others in ((SYSTEMS, SMALL), (OTHERS, SMALL_OTHERS)):
        for kind, system in others.items():
            monkeypatch.setitem(systems, kind, system)


def opened(place: Path, dtype: torch.dtype = torch.float32, offload: str = "none", **options) -> Model:
    return Model(open_system(place, CPU, dtype, offload=offload, systems=SMALL, **options), CPU, "small")


def refused(capsys, *arguments: object) -> str:
    """The one line said of a command that exits with 2."""
    assert run([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- drawing -------------------------------------------------------------------------------------------------------


def test_a_folder_and_its_single_file_draw_the_same(small, places, capsys):
    place = places("sd3.5-medium")
    assert run(["convert", str(place), "model.safetensors"]) == 0
    t5_tokenizer(Path("tokenizer_3"))  # beside the file
    for model, out in ((place, "a.png"), ("model.safetensors", "b.png")):
        assert run(["generate", "a red cube", "-m", str(model), *LIGHT, "-o", out]) == 0
    one, other = (np.asarray(Image.open(name)) for name in ("a.png", "b.png"))
    assert (one == other).all() and one.std() > 0
    recipe = read_recipe("b.png")
    assert recipe["request"]["sampler"] == "euler" and recipe["request"]["schedule"] == "flow_match"
    assert recipe["request"]["guidance"] == 4.5
    Path("tokenizer_3/tokenizer.json").unlink()
    assert "tokenizer" in refused(capsys, "generate", "a", "-m", "model.safetensors", *LIGHT)
    assert run(["generate", "a red cube", "-m", "model.safetensors", *LIGHT, "--no-t5", "-o", "c.png"]) == 0
    assert (np.asarray(Image.open("c.png")) != one).any() and read_recipe("c.png")["without"] == ["t5"]
    left = ["--without", "t5", "--no-clip-l"]
    assert run(["generate", "a red cube", "-m", "model.safetensors", *LIGHT, *left, "-o", "d.png"]) == 0
    assert read_recipe("d.png")["without"] == ["t5", "clip_l"]


@pytest.mark.parametrize(
    ("kind", "steps", "guidance"),
    [
        ("sd3-medium", 28, 7.0),
        ("sd3.5-medium", 40, 4.5),
        ("sd3.5-large", 28, 3.5),
        ("sd3.5-large-turbo", 4, 1.0),
    ],
)
def test_what_is_drawn_when_nothing_is_said(places, kind, steps, guidance):
    """The folder of the distilled one is known by its name alone."""
    model = opened(places(kind))
    assert model.system.config.kind == kind
    assert model.preset == {
        "steps": steps, "guidance": guidance, "sampler": "euler", "schedule": "flow_match", "size": (64, 64),
    }  # fmt: skip


def test_sizes_follow_patches_and_the_table_of_positions(places):
    model = opened(places("sd3-medium"))
    assert model.system.config.multiple == 8  # a factor of 4 here, and tokens of two cells
    with pytest.raises(InputError, match="size 60x64 is not a multiple of 8"):
        model.complete(replace(REQUEST, size=(60, 64)))
    with pytest.raises(InputError, match="104x64 is more than the"):
        model.sample(model.condition(REQUEST), [1], model.complete(replace(REQUEST, size=(104, 64))))


def test_what_it_is_asked_that_it_does_not_know(small, places, capsys):
    place = places("sd3-medium")
    line = refused(capsys, "generate", "a", "-m", place, "--prediction", "v")
    assert "is of sd3-medium, which predicts flow, not v" in line
    other = write_other("sd1", Path("other"))
    line = refused(capsys, "generate", "a", "-m", other, "--no-t5")
    assert "--without t5 is for checkpoints of the family sd3" in line and "'other' is of sd1" in line
    line = refused(capsys, "generate", "a", "-m", place, "--without", "t6", "--no-t5")
    assert "no text encoder 't6' to leave out; it has clip_l, clip_g, t5" in line
    line = refused(capsys, "generate", "a", "-m", place, "--no-t5", "--tokenizer", "gone.json")
    assert "gone.json is for T5, which is left out here; leave out the tokenizer too" in line
    vae = hollow(blank(KLConfig()).state_dict(), Path("vae.safetensors"))
    line = refused(capsys, "generate", "a", "-m", place, "--vae", vae)
    assert "vae.safetensors is f8c4, an autoencoder of other latents than" in line
    line = refused(capsys, "generate", "a", "-m", place, "--reuse", "2")
    assert "keeps no deep features" in line


def test_a_transformer_alone_takes_what_it_lacks_from_others(small, places, tmp_path, capsys):
    place = places("sd3.5-medium")
    whole = opened(place).generate(replace(REQUEST, size=(32, 32))).images[0].tobytes()
    alone = place / "transformer" / "diffusion_pytorch_model.safetensors"
    assert "take them from with --parts" in refused(capsys, "generate", "a", "-m", alone)
    model = load(alone, parts=[place], dtype=torch.float32)
    assert model.generate(replace(REQUEST, size=(32, 32))).images[0].tobytes() == whole
    # of a folder with no encoders but one, the others are left out
    some = write("sd3.5-medium", tmp_path / "some", without=("text_encoder", "text_encoder_3"))
    line = refused(capsys, "generate", "a", "-m", some)
    assert "holds no CLIP-L and no T5" in line and "--without clip_l --without t5" in line
    model = load(some, without=("clip_l", "t5"), dtype=torch.float32)
    assert model.generate(replace(REQUEST, size=(32, 32))).images[0].tobytes() != whole


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_changes_no_number(places, dtype):
    pictures = {
        offload: opened(places("sd3.5-medium"), dtype, offload).generate(REQUEST).images[0].tobytes()
        for offload in OFFLOADS
    }
    assert pictures["none"] == pictures["model"] == pictures["sequential"]


def test_one_network_at_a_time_is_in_memory(places):
    model = opened(places("sd3-medium"), offload="model")
    held, networks = model.system.networks.held, model.system.networks
    seen, order = [], []
    openers = dict(networks.openers)

    def watched(name):
        def make():
            assert not any(there() is not None for there in seen)  # those before are gone
            made = openers[name]()
            order.append(name)
            seen.append(weakref.ref(made))
            return made

        return make

    networks.openers = {name: watched(name) for name in openers}
    model.generate(REQUEST)
    assert order == ["text_encoder", "text_encoder_2", "text_encoder_3", "denoiser", "autoencoder"]
    assert held() == ("autoencoder",)


@pytest.mark.parametrize("kind", ["sd3-medium", "sd3.5-medium"])
def test_the_trace_of_a_small_one_is_what_it_allocates(places, kind):
    model = opened(places(kind))
    request = model.complete(REQUEST)
    stages = {s.name: s for s in model.system.trace(request, (64, 96), 1, encodes=False, offload="model")}
    cond = model.condition(request)
    denoise = model.denoiser(cond, request)
    x = torch.randn(1, *model.system.latent_shape(1, 96, 64))
    with torch.inference_mode(), LiveBytes() as real:
        denoise(x, torch.tensor(0.7))
    assert stages["denoise"].activations == pytest.approx(real.peak, rel=0.05)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of SD 3 Medium's full size, of zeros that take no place on the disk, and T5's tokenizer beside it."""
    system = SYSTEMS["sd3-medium"]
    configs = {"transformer": system.transformer, "vae": system.vae} | {p.name: p.config for p in system.text}
    ours = {
        f"{part}.{name}": tensor
        for part, config in configs.items()
        for name, tensor in blank(config).state_dict().items()
        if "position_ids" not in name
    }
    path = tmp_path_factory.mktemp("published") / "sd3_medium_incl_clips_t5xxlfp16.safetensors"
    hollow(FAMILY.file_map(system).to_theirs(ours), path)
    t5_tokenizer(path.parent)
    return path


TEXT = 4_762_310_656  # parameters of T5, the largest that reads


@pytest.mark.parametrize(("without", "limit"), [((), 12), (("t5",), 8)])
def test_sd_3_medium_fits_where_it_should(published, without, limit):
    """1024², in bfloat16, with a network at a time."""
    model = load(published, dtype=torch.bfloat16, offload="model", without=without)
    request = Request("a red cube", size=(1024, 1024))
    found = planning.plan_of(model, request, "model", limit * 2**30)
    assert found.peak < limit * 2**30
    weights = {stage.name: stage.weights for stage in found.stages}
    assert weights["denoise"] == pytest.approx(2 * (2_028_328_000 + 56_623_104), rel=0.01)
    assert weights["text"] == pytest.approx(2 * (694_659_840 if without else TEXT), rel=0.01)


def test_t5_in_eight_bits_takes_half(published):
    model = load(published, dtype=torch.bfloat16, offload="model", text_dtype=torch.int8)
    stages = planning.plan_of(model, Request("a red cube", size=(512, 512)), "model", None).stages
    text = next(stage.weights for stage in stages if stage.name == "text")
    assert 0.5 < text / (2 * TEXT) < 0.53  # of bfloat16, as above


def test_the_plan_on_the_command_line(published, capsys):
    assert (
        run(
            [
                "generate",
                "a",
                "-m",
                str(published),
                "--plan",
                "--json",
                "--dtype",
                "bf16",
                "--offload",
                "model",
            ]
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["offload"] == "model" and set(plan["stages"]) == {"load", "text", "denoise", "decode"}


# --- files ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_it_is(published, places, capsys):
    assert run(["inspect", str(published), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["family"], told["layout"]) == ("sd3-medium", "original")
    assert set(told["parts"]) == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    assert told["parts"]["text_encoder_3"]["parameters"] == 4_762_310_656
    assert told["parts"]["transformer"]["parameters"] == 2_028_328_000 + 56_623_104


def test_a_published_vae_is_made_of_its_tensors(tmp_path):
    vae = AutoencoderKL(SYSTEMS["sd3-medium"].vae)
    assert sum(weight.numel() for weight in vae.parameters()) == 83_819_683


def test_damage_is_one_line_that_names_it(places, tmp_path):
    place = tmp_path / "model"
    write("sd3-medium", place)
    file = place / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.1.attn.to_q.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError, match=r"\(transformer\): transformer_blocks.1.attn.to_q.weight holds NaN"
    ):
        opened(place)
    del tensors["transformer_blocks.1.attn.to_q.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"1 missing: transformer_blocks.1.attn.to_q.weight"):
        opened(place)
    with pytest.raises(CheckpointError, match="shift must be a positive number, not 'x'"):
        opened(write("sd3-medium", tmp_path / "shift", shift="x"))


def picture(name: str) -> np.ndarray:
    return np.asarray(Image.open(name))


def test_a_lora_on_the_command_line(small, places, capsys):
    """Drawn with, found again by `--like`, merged into the checkpoint; a file of another family is named."""
    place = str(places("sd3-medium"))
    key = "transformer.transformer_blocks.0.attn.to_q"
    factors = {f"{key}.lora_A.weight": torch.randn(4, 48), f"{key}.lora_B.weight": torch.randn(48, 4)}
    save_file(factors, "ink.safetensors")
    draw = ["generate", "a red cube", "-m", place, *LIGHT, "--seed", "1"]
    assert run([*draw, "-o", "plain.png"]) == 0
    assert run([*draw, "--lora", "ink.safetensors:0.8:blocks.0=0.5", "-o", "ink.png"]) == 0
    assert (picture("ink.png") != picture("plain.png")).any()
    again = ["generate", "--like", "ink.png", "-m", place, "--lora", "ink.safetensors", "--dtype", "fp32"]
    assert run([*again, "-o", "again.png"]) == 0
    assert (picture("again.png") == picture("ink.png")).all()
    assert run(["convert", place, "merged", "--merge", "ink.safetensors:0.4"]) == 0
    assert run([*draw[:3], "merged", *draw[4:], "-o", "merged.png"]) == 0
    assert np.abs(picture("merged.png").astype(int) - picture("ink.png")).max() <= 1
    assert run(["lora", "inspect", "ink.safetensors", "-m", place]) == 0
    assert "1 of transformer" in capsys.readouterr().out
    save_file({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight":
               torch.ones(1, 768)}, "other.safetensors")  # fmt: skip
    line = refused(capsys, "generate", "a", "-m", place, "--lora", "other.safetensors")
    assert "is a LoRA for Stable Diffusion 1" in line and "this model is Stable Diffusion 3" in line


def test_a_learnt_word_on_the_command_line(small, places, capsys):
    place = str(places("sd3-medium"))
    save_file({"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}, "toy.safetensors")
    draw = ["generate", "a toy", "-m", place, *LIGHT, "--seed", "1"]
    assert run([*draw, "-o", "plain.png"]) == 0
    assert run([*draw, "--embedding", "toy.safetensors", "-o", "toy.png"]) == 0
    assert (picture("toy.png") != picture("plain.png")).any()
    assert set(read_recipe("toy.png")["embeddings"]) == {"toy"}
    save_file({"emb_params": torch.randn(2, 32)}, "one.safetensors")
    line = refused(capsys, *draw, "--embedding", "one.safetensors")
    assert "vectors for one encoder of width 32; Stable Diffusion 3 reads width 32 and 48" in line


def test_a_preset_is_over_what_the_name_says(places, tmp_path):
    turbo = places("sd3.5-large-turbo")
    assert opened(turbo).system.read_as == {"preset": "turbo"}
    assert opened(turbo).system.config.guessed == "sd3.5-large-turbo"
    plain = opened(turbo, preset="plain")
    assert plain.preset["steps"] == 28 and plain.system.config.kind == "sd3.5-large"
    other = opened(places("sd3.5-large"), preset="turbo")
    assert other.preset["guidance"] == 1.0 and other.system.config.guessed == ""
    with pytest.raises(InputError, match="whose presets are plain, not 'turbo'"):
        opened(places("sd3-medium"), preset="turbo")
    with pytest.raises(InputError, match="whose presets are plain, turbo, not 'lcm'"):
        opened(turbo, preset="lcm")


def test_what_t5_cannot_read_is_told_without_a_network(small, places, monkeypatch):
    model = load(str(places("sd3.5-medium")), "cpu", dtype=torch.float32)
    monkeypatch.setattr(type(model.system), "condition", None)
    for name in ("prompt", "negative"):
        request = model.complete(replace(REQUEST, **{name: "red cube sphere " * 400}))
        with pytest.raises(InputError, match=f"the {name} has .* tokens of T5") as refused:
            check_texts(model, request)
        assert refused.value.argument == name
    check_texts(model, model.complete(REQUEST))
