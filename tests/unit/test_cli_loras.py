"""LoRAs on the command line: drawn with and found again, merged, extracted, made smaller, looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import small_control
from sfumato.cli import loras
from sfumato.cli.app import run
from sfumato.errors import InputError
from sfumato.families.convert import convert
from sfumato.families.sd.checkpoint import open_checkpoint
from sfumato.receipts import webui
from sfumato.receipts.provenance import read_like, read_recipe
from sfumato.storage import data_hash
from small_sd import stand_for_the_published, write

LIGHT = ["--steps", "2", "--size", "32", "--dtype", "fp32"]
TO_Q, TO_K = (f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qk")
KEY = "lora_unet_" + TO_Q.replace(".", "_")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write("sd1", tmp_path_factory.mktemp("sd1") / "model"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder_with_a_lora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_for_the_published(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    save_file(
        {
            f"{KEY}.lora_up.weight": torch.randn(64, 4, generator=generator),
            f"{KEY}.lora_down.weight": torch.randn(4, 64, generator=generator),
            f"{KEY}.alpha": torch.tensor(4.0),
        },
        "ink.safetensors",
        metadata={"ss_network_alpha": "4", "ss_output_name": "ink"},
    )


def draw(model: str, *arguments: str, out: str = "out.png") -> np.ndarray:
    assert run(["generate", "a cat", "-m", model, *LIGHT, *arguments, "-o", out]) == 0
    return pixels(out)


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert run(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_picture_says_its_loras_and_comes_back(model, capsys):
    plain = draw(model, out="plain.png")
    drawn = draw(model, "--lora", "ink.safetensors:0.5:mid=0.8,text=0.5")
    assert (drawn != plain).any()
    recipe = read_recipe("out.png")
    use = {"name": "ink", "weight": 0.5, "blocks": {"mid": 0.8, "text": 0.5}}
    assert recipe["request"]["loras"] == [use]
    digest = data_hash(Path("ink.safetensors"))
    assert recipe["loras"] == {"ink": digest}
    with Image.open("out.png") as image:
        told = image.text["parameters"]
    assert told.startswith("a cat <lora:ink:0.25:0.5>\n") and f'Lora hashes: "ink: {digest[:12]}"' in told

    like = ["generate", "--like", "out.png", "-m", model, "--dtype", "fp32", "-o", "again.png"]
    assert "give its file by --lora" in refused(capsys, *like)
    assert run([*like, "--lora", "ink.safetensors"]) == 0
    assert (pixels("again.png") == drawn).all() and read_recipe("again.png")["request"] == recipe["request"]
    assert run([*like, "--lora", "none"]) == 0
    assert (pixels("again.png") == plain).all()
    assert run([*like, "--lora", "ink.safetensors:0.1"]) == 0
    assert read_recipe("again.png")["request"]["loras"] == [use | {"weight": 0.1}]
    save_file({f"{KEY}.diff": torch.ones(64, 64)}, "ink.safetensors")
    capsys.readouterr()
    assert run([*like, "--lora", "ink.safetensors"]) == 0
    assert "another LoRA 'ink'" in capsys.readouterr().err


def test_two_loras_and_names_of_their_own(model):
    one = draw(model, "--lora", "ink.safetensors:0.25", "--lora", "pen=ink.safetensors:0.25")
    assert (
        one == draw(model, "--lora", "ink.safetensors:0.5", out="half.png")
    ).mean() > 0.99  # but for rounding
    assert list(read_recipe("out.png")["loras"]) == ["ink", "pen"]


@pytest.mark.parametrize(
    ("text", "name", "weight", "blocks"),
    [
        ("ink.safetensors", "ink", None, None),
        ("ink.safetensors:0.8", "ink", 0.8, None),
        ("ink.safetensors:-1:mid=0", "ink", -1.0, {"mid": 0.0}),
        ("ink.safetensors:down.1=0.5,text=0", "ink", None, {"down.1": 0.5, "text": 0.0}),
        ("pen=some/where.safetensors:2", "pen", 2.0, None),
        ("a:b=c.safetensors", "a:b=c", None, None),
    ],
)
def test_how_a_lora_is_said(text, name, weight, blocks):
    if text.startswith("a:"):
        Path(text).touch()
    (one,) = loras.given([text])
    assert (one.name, one.weight, one.blocks) == (name, weight, blocks)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ink.safetensors:strong", r"lora\.weight must be a number, not 'strong'"),
        ("ink.safetensors:0.5:mid=x", "lora block mid must be a number"),
        ("ink.safetensors:0.5:mid=1,mid=2", "must be like down.1=0.5,mid=0"),
        ("=ink.safetensors", r"must be \[NAME=\]FILE"),
    ],
)
def test_how_it_is_not(text, said):
    with pytest.raises(InputError, match=said):
        loras.given([text])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ink.safetensors:nan"], 'weight of LoRA "ink" must be between -100 and 100, not NaN'),
        (["ink.safetensors:inf"], 'weight of LoRA "ink" must be between -100 and 100, not Infinity'),
        (["ink.safetensors:1:sky=2"], 'sd1 has no block "sky"'),
        (["gone.safetensors"], "gone.safetensors does not exist"),
        (["ink.safetensors", "--lora", "./ink.safetensors"], "two LoRAs are called 'ink'"),
    ],
)
def test_refusals_are_one_line(model, capsys, arguments, said):
    assert said in refused(capsys, "generate", "x", "-m", model, *LIGHT, "--lora", *arguments)


def test_a_part_is_taken_only_when_asked_for(model, capsys):
    tensors = load_file("ink.safetensors") | {"lora_unet_sky.lora_up.weight": torch.ones(2, 2)}
    save_file(tensors, "odd.safetensors")
    said = refused(capsys, "generate", "x", "-m", model, *LIGHT, "--lora", "odd.safetensors")
    assert "1 of 4 tensors have no place" in said and "lora_unet_sky.lora_up.weight" in said
    assert said.endswith("take the rest with --lora-partial")
    drawn = draw(model, "--lora", "odd.safetensors", "--lora-partial")
    assert "note: LoRA odd: kohya, rank 4: 1 of unet; 1 left out: lora_unet_sky" in capsys.readouterr().err
    assert (drawn == draw(model, "--lora", "ink.safetensors")).all()


@pytest.mark.full
def test_a_refiner_is_drawn_with_as_it_is(tmp_path_factory, capsys):
    """A LoRA is the base's: the refiner neither needs it nor minds it."""
    base, refiner = (
        str(write(kind, tmp_path_factory.mktemp(kind) / "model")) for kind in ("sdxl", "sdxl-refiner")
    )
    with_refiner = ["--refiner", f"{refiner}:0.5"]
    module = KEY.replace("attn1_to_q", "attn1_to_out_0")
    save_file({f"{module}.diff": torch.eye(64)}, "eye.safetensors")
    plain = draw(base, *with_refiner)
    drawn = draw(base, *with_refiner, "--lora", "eye.safetensors:0.5")
    assert (drawn != plain).any() and list(read_recipe("out.png")["loras"]) == ["eye"]
    assert (draw(base, *with_refiner, "--lora", "eye.safetensors:0") == plain).all()


def test_a_factor_that_does_nothing_is_told(model, capsys):
    draw(model, "--lora", "ink.safetensors:1:text=0.5,mid=0.5")
    assert "note: LoRA ink changes nothing in text, so a factor there does nothing" in capsys.readouterr().err


def test_what_stands_beside_loras_or_in_their_place_is_told_with_its_option(model, capsys):
    save_file(
        load_file("ink.safetensors") | {"bundle_emb.cat.string_to_param.*": torch.ones(1, 4)},
        "both.safetensors",
    )
    assert "a file of its own by --embedding" in refused(
        capsys, "generate", "x", "-m", model, *LIGHT, "--lora", "both.safetensors"
    )
    draw(model, "--lora", "both.safetensors", "--lora-partial")
    assert "a file of its own by --embedding" in capsys.readouterr().err
    save_file(small_control.tensors("sd1"), "canny.safetensors")
    assert "is a ControlNet, not a LoRA; give it by --controlnet KIND=FILE" in refused(
        capsys, "generate", "x", "-m", model, *LIGHT, "--lora", "canny.safetensors"
    )
    twice = ["--merge", "ink.safetensors", "--merge", "ink.safetensors"]
    said = refused(capsys, "convert", model, "out.safetensors", *twice)
    assert "give one of them another name: --merge NAME=FILE" in said
    draw(model)
    assert "by --controlnet pose=FILE" in refused(
        capsys, "generate", "x", "-m", model, *LIGHT, "--control", "pose=out.png"
    )
    assert "--clip-skip must be" in refused(capsys, "generate", "x", "-m", model, *LIGHT, "--clip-skip", "99")


def test_a_plan_with_a_lora_draws_nothing(model, capsys):
    assert run(["generate", "x", "-m", model, *LIGHT, "--lora", "ink.safetensors", "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] and not Path("out.png").exists()


def test_an_lcm_lora_draws_in_four_steps_unless_told_otherwise(model, capsys):
    Path("ink.safetensors").rename("lcm-lora.safetensors")
    assert run(["generate", "x", "-m", model, "--size", "32", "--lora", "lcm-lora.safetensors"]) == 0
    assert (
        'note: LoRA lcm-lora is taken for one made for few steps (lcm), for it is called "lcm-lora": drawn with '
        "steps 4, guidance 1, sampler lcm, schedule lcm; say others by --steps, --guidance, --sampler, --schedule"
    ) in capsys.readouterr().err
    request = read_recipe("out.png")["request"]
    assert [request[n] for n in ("steps", "guidance", "sampler", "schedule")] == [4, 1.0, "lcm", "lcm"]
    assert (
        run(["generate", "x", "-m", model, *LIGHT, "--sampler", "euler", "--lora", "lcm-lora.safetensors"])
        == 0
    )
    request = read_recipe("out.png")["request"]
    assert [request[n] for n in ("steps", "guidance", "sampler")] == [2, 1.0, "euler"]
    assert "drawn with guidance 1, schedule lcm; say" in capsys.readouterr().err


def test_of_two_for_few_steps_the_last_is_told_to_have_its_way(model, capsys):
    for name in ("lcm-lora", "turbo_8step_lora"):
        shutil.copy("ink.safetensors", f"{name}.safetensors")
    both = ["--lora", "lcm-lora.safetensors", "--lora", "turbo_8step_lora.safetensors"]
    assert run(["generate", "x", "-m", model, "--size", "32", *both]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "is taken for" in line]
    assert len(notes) == 1 and "LoRA turbo_8step_lora is taken for" in notes[0]
    assert "drawn with steps 8" in notes[0] and "though lcm-lora wants steps 4, sampler lcm" in notes[0]
    assert read_recipe("out.png")["request"]["steps"] == 8


# --- the web UI's form ---------------------------------------------------------------------------------------------

SETTINGS = "\nSteps: 20, Sampler: Euler, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512"


@pytest.mark.parametrize(
    ("tags", "uses"),
    [
        ("<lora:ink:0.8>", [{"name": "ink", "weight": 0.8}]),
        ("<lora:ink>", [{"name": "ink", "weight": 1.0}]),
        ("<lora:ink:0.5:1>", [{"name": "ink", "weight": 1.0, "blocks": {"text": 0.5}}]),
        ("<lora:ink:te=0:unet=0.5>", [{"name": "ink", "weight": 0.5, "blocks": {"text": 0.0}}]),
        ("<lora:a:1>, <lyco:b:-0.5>", [{"name": "a", "weight": 1.0}, {"name": "b", "weight": -0.5}]),
    ],
)
def test_tags_of_the_web_ui_are_read(tags, uses):
    request, ignored = webui.read(f"a cat {tags}{SETTINGS}")
    assert request["loras"] == uses and request["prompt"].rstrip(" ,") == "a cat" and not ignored


def test_a_tag_without_a_number_is_refused(tmp_path):
    with pytest.raises(InputError, match='LoRA "ink" has the weight "much"'):
        webui.read(f"a cat <lora:ink:much>{SETTINGS}")


def test_pictures_of_the_web_ui_name_hashes(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", f'a cat <lora:ink:0.8>{SETTINGS}, Lora hashes: "ink: 0123456789ab"')
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=info)
    assert read_like("theirs.png").loras == {"ink": "0123456789ab"}


# --- files ---------------------------------------------------------------------------------------------------------


def test_merged_for_good(model, capsys):
    assert run(["convert", model, "merged.safetensors", "--merge", "ink.safetensors:0.5:mid=0.5"]) == 0
    assert "merged: ink.safetensors: kohya, rank 4: 1 of unet" in capsys.readouterr().out
    drawn = draw("merged.safetensors")
    assert (drawn == draw(model, "--lora", "ink.safetensors:0.25")).all()
    before, after = open_checkpoint(model), open_checkpoint("merged.safetensors")
    for name in before.parts["unet"]:
        same = torch.equal(before.parts["unet"][name], after.parts["unet"][name])
        assert same != (name == f"{TO_Q}.weight")
    (noted,) = json.loads(after.metadata["sfumato.merged"])
    assert noted == {
        "name": "ink", "sha256": data_hash(Path("ink.safetensors")), "weight": 0.5, "blocks": {"mid": 0.5}
    }  # fmt: skip


def test_merging_names_the_file_that_it_is_about(model, capsys):
    said = refused(capsys, "convert", model, "no.safetensors", "--merge", "ink.safetensors:nan")
    assert 'weight of LoRA "ink" must be between -100 and 100, not NaN' in said


def test_merged_keeps_the_types_that_the_file_has(model, capsys):
    convert(model, "half.safetensors", dtype=torch.float16)
    convert("half.safetensors", "merged.safetensors", merge=[("ink.safetensors", 1.0, {})])
    before, after = open_checkpoint("half.safetensors"), open_checkpoint("merged.safetensors")
    assert {after.parts["unet"].info(n) for n in after.parts["unet"]} == {
        before.parts["unet"].info(n) for n in before.parts["unet"]
    }
    up, down = (load_file("ink.safetensors")[f"{KEY}.lora_{x}.weight"].double() for x in ("up", "down"))
    right = before.parts["unet"][f"{TO_Q}.weight"].double() + up @ down
    assert torch.allclose(after.parts["unet"][f"{TO_Q}.weight"].double(), right, rtol=2**-10, atol=1e-6)
    save_file({f"{KEY}.diff": torch.full((64, 64), 9e4)}, "loud.safetensors")
    assert "beyond the range of torch.float16" in refused(
        capsys, "convert", "half.safetensors", "x.safetensors", "--merge", "loud.safetensors"
    )
    assert not Path("x.safetensors").exists()


def test_extracted_from_two_models(model, capsys):
    """What was merged is found again, to the rank it had; of a smaller one, the share that is kept is told."""
    convert(model, "tuned", merge=[("ink.safetensors", 1.0, {})])
    assert (
        run(["lora", "extract", model, "tuned", "-o", "found.safetensors", "--rank", "4", "--dtype", "fp32"])
        == 0
    )
    assert "1 modules" in capsys.readouterr().out
    old, new = load_file("ink.safetensors"), load_file("found.safetensors")
    assert set(old) == set(new)
    ends = [f"{KEY}.lora_{x}.weight" for x in ("up", "down")]
    right = old[ends[0]] @ old[ends[1]]
    assert torch.allclose(new[ends[0]] @ new[ends[1]], right, atol=1e-4)
    assert (draw(model, "--lora", "found.safetensors") == draw("tuned", out="tuned.png")).mean() > 0.99

    assert run(["lora", "extract", model, "tuned", "-o", "less.safetensors", "--rank", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    values = torch.linalg.svdvals(right.double()).square()
    assert told["share"] == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-3)
    assert "differs from" in refused(capsys, "lora", "extract", model, model, "-o", "no.safetensors")
    assert "rank must be" in refused(
        capsys, "lora", "extract", model, "tuned", "-o", "n.safetensors", "--rank", "0"
    )
    assert "exists" in refused(capsys, "lora", "extract", model, "tuned", "-o", "less.safetensors")


@pytest.mark.parametrize("form", ["kohya", "PEFT", "LoHa"])
def test_made_smaller_under_its_own_names(form, capsys):
    """The nearest of that rank, as its singular values say, with alpha multiplied in."""
    generator = torch.Generator().manual_seed(2)
    up, down = (torch.randn(*s, generator=generator) for s in ((64, 4), (4, 64)))
    whole = 0.5 * up @ down
    tensors = {
        "kohya": {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down, f"{KEY}.alpha": torch.tensor(2.0)},
        "PEFT": {f"unet.{TO_Q}.lora_B.weight": up * 0.5, f"unet.{TO_Q}.lora_A.weight": down},
        "LoHa": {
            f"{KEY}.hada_w1_a": up, f"{KEY}.hada_w1_b": down, f"{KEY}.alpha": torch.tensor(2.0),
            f"{KEY}.hada_w2_a": torch.full((64, 1), 1.0), f"{KEY}.hada_w2_b": torch.full((1, 64), 1.0),
        },
    }[form]  # fmt: skip
    save_file(tensors, "big.safetensors")
    assert run(["lora", "resize", "big.safetensors", "--rank", "2", "-o", "small.safetensors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    small = load_file("small.safetensors")
    ends = (f"unet.{TO_Q}.lora_B.weight", f"unet.{TO_Q}.lora_A.weight") if form == "PEFT" else (
        f"{KEY}.lora_up.weight", f"{KEY}.lora_down.weight")  # fmt: skip
    assert set(small) == {*ends, *([] if form == "PEFT" else [f"{KEY}.alpha"])}
    u, s, vh = torch.linalg.svd(whole.double())
    assert torch.allclose((small[ends[0]] @ small[ends[1]]).double(), u[:, :2] * s[:2] @ vh[:2], atol=1e-4)
    assert small[ends[1]].shape[0] == 2 and (form == "PEFT" or float(small[f"{KEY}.alpha"]) == 2.0)
    assert told["share"] == pytest.approx(float(s[:2].square().sum() / s.square().sum()), rel=1e-5)


def test_what_is_made_smaller_notes_the_greatest_rank_it_has(model):
    save_file(
        load_file("ink.safetensors"),
        "noted.safetensors",
        metadata={"ss_network_dim": "4", "ss_network_alpha": "4"},
    )
    assert run(["lora", "resize", "noted.safetensors", "--rank", "64", "-o", "small.safetensors"]) == 0
    with safe_open("small.safetensors", "pt") as file:
        notes = file.metadata()
    assert notes["ss_network_dim"] == notes["ss_network_alpha"] == "4"


def test_a_module_that_is_changed_twice_is_not_made_smaller(capsys):
    tensors = load_file("ink.safetensors")
    up, down = (tensors[f"{KEY}.lora_{x}.weight"] for x in ("up", "down"))
    save_file(
        tensors | {f"unet.{TO_Q}.lora_B.weight": up.clone(), f"unet.{TO_Q}.lora_A.weight": down.clone()},
        "two.safetensors",
    )
    said = refused(capsys, "lora", "resize", "two.safetensors", "--rank", "2", "-o", "small.safetensors")
    assert "changes one module twice" in said and KEY in said


def test_a_file_is_told_from_its_header(capsys):
    assert run(["inspect", "ink.safetensors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["adapter"] == "LoRA" and told["layout"] == "kohya" and told["ranks"] == {"4": 1}
    assert told["alpha"] == "4" and told["parts"] == {"unet": {"modules": 1}}
    wide = KEY.replace("attn1_to_q", "attn2_to_k")
    save_file({f"{wide}.lora_down.weight": torch.ones(2, 2048), "odd": torch.ones(1)}, "xl.safetensors")
    assert run(["lora", "inspect", "xl.safetensors"]) == 0
    text = capsys.readouterr().out
    assert (
        "sdxl (kohya names)" in text
        and "reads texts of width 2048" in text
        and "1 tensors, such as odd" in text
    )


def test_kinds_that_are_not_read_are_told_from_the_header(capsys):
    save_file({"lora_unet_conv_in.oft_blocks": torch.ones(2, 2, 2)}, "turned.safetensors")
    assert run(["lora", "inspect", "turned.safetensors"]) == 0
    assert "this is an adapter of OFT, not supported" in capsys.readouterr().out


def test_a_file_is_weighed_on_a_model(model, capsys):
    assert run(["lora", "inspect", "ink.safetensors", "-m", model, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    tensors, base = load_file("ink.safetensors"), open_checkpoint(model).parts["unet"][f"{TO_Q}.weight"]
    change = tensors[f"{KEY}.lora_up.weight"] @ tensors[f"{KEY}.lora_down.weight"]
    assert told["relative"] == {"unet": pytest.approx(float(change.norm() / base.norm()), rel=1e-4)}
    assert told["report"] == "kohya, rank 4: 1 of unet" and "left" not in told
    save_file(tensors | {"lora_unet_sky.lora_up.weight": torch.ones(2, 2)}, "odd.safetensors")
    assert run(["lora", "inspect", "odd.safetensors", "-m", model, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["left"] == {"lora_unet_sky.lora_up.weight": "no module of sd1"}
