"""The web UI's form of a request: what is written into pictures, and what is read from other people's."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.diffusion.schedules import SCHEDULES
from sfumato.errors import InputError
from sfumato.pictures import fingerprint
from sfumato.receipts import webui
from sfumato.receipts.provenance import read_like, save_images
from sfumato.receipts.webui import read, split, write
from sfumato.sampling import SAMPLERS
from sfumato.tasks.latent import UPSCALERS
from sfumato.text.syntax import RULES
from sfumato.text.weighting import WEIGHTINGS
from sfumato.types import HiRes, Inpaint, Micro, Request, Result, Variation

PICTURE = Image.new("RGB", (8, 8), "teal")
MASK = Image.new("L", (8, 8), 255)


def written(request: Request, **recipe) -> str:
    return write({"request": request.to_dict(), **recipe}, "sfumato 9")


def settings_of(request: Request, **recipe) -> str:
    return written(request, **recipe).split("\n")[-1]


# --- writing -----------------------------------------------------------------------------------------------------


def test_the_form():
    request = Request(
        "a castle\non a hill", "fog, rain", seed=7, steps=20, guidance=7.0, sampler="dpmpp_2m", schedule="karras",
        size=(512, 768),
    )  # fmt: skip
    text = written(request, weights={"a": "12"}, model="my model")
    assert text == (
        "a castle\non a hill\nNegative prompt: fog, rain\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 512x768, "
        "Model hash: 6b51d431df, Model: my model, Version: sfumato 9"
    )


def test_what_the_tasks_add():
    request = Request(image=PICTURE, mask=MASK, strength=0.6, inpaint=Inpaint(padding=32), size=(64, 64))
    assert settings_of(request) == (
        "Seed: 0, Size: 64x64, Denoising strength: 0.6, Mask blur: 4, Inpaint area: Only masked, "
        "Masked area padding: 32, Version: sfumato 9"
    )
    request = Request(
        hires=HiRes(1.5, 10, 0.4, "latent-bicubic"), variation=Variation(9, 0.25), eta=0.5, clip_skip=2
    )
    assert settings_of(request) == (
        "Seed: 0, Variation seed: 9, Variation seed strength: 0.25, Denoising strength: 0.4, Clip skip: 2, Eta: 0.5, "
        "Hires upscale: 1.5, Hires steps: 10, Hires upscaler: Latent (bicubic), Version: sfumato 9"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("a, b", '"a, b"'),
        ("C:\\models", '"C:\\\\models"'),
        ("a\nb", '"a\\nb"'),
        ('"a"', '"\\"a\\""'),
        (' "x', '" \\"x"'),
        ("émile", "émile"),
    ],
)
def test_values_that_would_be_misread_are_quoted_as_json(value, shown):
    text = written(Request("p", steps=1), model=value)
    assert f"Model: {shown}, Version" in text
    assert split(text)[2]["Model"] == value


def test_every_name_of_ours_that_has_a_label_is_one():
    assert set(webui.SAMPLERS) == set(SAMPLERS)
    assert set(webui.SCHEDULES) <= set(SCHEDULES)
    assert set(webui.UPSCALERS) == set(UPSCALERS)
    assert list(webui.MICRO) == [f.name for f in fields(Micro)]


# --- there and back -------------------------------------------------------------------------------------------------


PAIR = st.tuples(st.integers(1, 65536), st.integers(1, 65536))
plain_text = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=60).map(str.strip)


@settings(max_examples=200, deadline=None)
@given(
    prompt=plain_text, negative=plain_text, model=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    seed=st.integers(0, 2**64 - 1), steps=st.integers(1, 1000), guidance=st.floats(0, 100),
    sampler=st.sampled_from(sorted(SAMPLERS)), schedule=st.sampled_from(sorted(SCHEDULES)),
    size=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    hires=st.none() | st.builds(
        HiRes, st.floats(1, 16), st.none() | st.integers(1, 99), st.floats(0, 1), st.sampled_from(sorted(UPSCALERS))
    ),
    variation=st.none() | st.builds(Variation, st.integers(0, 2**64 - 1), st.floats(0.001, 1)),
    clip_skip=st.none() | st.integers(2, 12), eta=st.none() | st.floats(0, 1),
    prompt_rules=st.none() | st.sampled_from(sorted(RULES)), weighting=st.none() | st.sampled_from(WEIGHTINGS),
    micro=st.none() | st.builds(
        Micro, PAIR, PAIR, PAIR, st.floats(0, 10), st.none() | PAIR, st.none() | PAIR, st.none() | PAIR,
        st.none() | st.floats(0, 10),
    ),
    refine_at=st.none() | st.floats(0, 1),
)  # fmt: skip
def test_a_request_comes_back(model, **fields):
    request = Request(**fields)
    if request.prompt.startswith("Negative prompt:"):
        return
    refiner = None if request.refine_at is None else {"model": "a, b"}
    found, ignored = read(written(request, model=model, refiner=refiner))
    assert Request.from_dict(found) == request and ignored == []


@given(strength=st.floats(0.001, 0.999), blur=st.integers(0, 64), padding=st.none() | st.integers(0, 99))
@settings(deadline=None)
def test_the_settings_of_a_picture_s_task_come_back(strength, blur, padding):
    request = Request(
        "a", image=PICTURE, mask=MASK, strength=strength, inpaint=Inpaint(blur, True, padding), steps=4
    )
    found, _ = read(written(request))
    assert found["strength"] == strength
    assert found["inpaint"] == {"blur": blur} | ({} if padding is None else {"padding": padding})


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('aZ9 -/_,:"\\\n{}[]é'), max_size=80))
def test_any_text_is_taken_apart_or_refused(text):
    try:
        found, _ = read(text + "\nSteps: 4, Seed: 1, " + text)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(found["prompt"], str)


def test_a_long_line_of_nothing_is_read_in_one_walk():
    """A search that begins anew at every letter would take hours."""
    for piece in ("a", "a,", "a:", 'a:"', '\\"', "[{", "a: b,"):
        split("prompt\n" + piece * (2**20 // len(piece)))


# --- other people's pictures ---------------------------------------------------------------------------------------


A1111_110 = """masterpiece, (a lighthouse:1.2) at dusk, <lora:detail:0.8>
BREAK waves
Negative prompt: lowres, bad anatomy,
watermark
Steps: 28, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 3814829106, Size: 832x1216, \
Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Clip skip: 2, Lora hashes: "detail: 5c8b0f1e0e9b", Version: v1.10.1"""
A1111_HIRES = """a fox
Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Denoising strength: 0.7, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, \
Version: v1.9.4"""
A1111_OLD = """a fox
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 45dee52b, \
Eta: 0.67, ENSD: 31337"""
A1111_INPAINT = """a hat
Steps: 30, Sampler: DPM++ SDE, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x512, Model: inpaint, \
Denoising strength: 0.75, Mask blur: 4, Inpaint area: Only masked, Masked area padding: 32, \
Masked content: fill, Version: v1.10.0"""
A1111_VARIATION = """a fox
Steps: 20, Sampler: Heun, Schedule type: Exponential, CFG scale: 7.5, Seed: 1, Size: 512x512, Variation seed: 42, \
Variation seed strength: 0.15, Seed resize from: 256x256, Version: v1.9.4"""
FORGE = """a fox
Steps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 2, Size: 896x1152, \
Model hash: bea01d51bd, Model: flux1-dev-bnb-nf4-v2, Version: f2.0.1v1.10.1-previous-659-gc055f2d4, Module 1: ae"""
IMAGE_SAVER = """a fox
Negative prompt: blurry
Steps: 25, Sampler: DPM++ 2M Karras, CFG Scale: 8.0, Seed: 9, Size: 1024x1024, Clip skip: 1, Model hash: 31e35c80fc, \
Model: sd_xl_base_1.0, Denoising strength: 1.0, Hashes: {"model":"31e35c80fc","lora:x":"abc"}, Version: ComfyUI"""
COMFY_NAMES = """a fox
Steps: 25, Sampler: euler_ancestral_sgm_uniform, CFG scale: 8, Seed: 9, Size: 1024x1024, Version: ComfyUI"""
CIVITAI = """a fox
Negative prompt: 
Steps: 30, Sampler: Euler a, CFG scale: 7, Seed: 12, Size: 832x1216, Clip skip: 2, \
Created Date: 2024-11-02T1003:11.5Z, \
Civitai resources: [{"type":"checkpoint","modelVersionId":290640,"modelName":"Pony, V6"}], Civitai metadata: {}"""


def like(**fields):
    return {"prompt": "a fox", "negative": "", **fields}


@pytest.mark.parametrize(
    ("text", "fields", "ignored"),
    [
        (
            A1111_110,
            {
                "prompt": "masterpiece, (a lighthouse:1.2) at dusk,\nBREAK waves",
                "loras": [{"name": "detail", "weight": 0.8}],
                "negative": "lowres, bad anatomy,\nwatermark",
                "steps": 28, "sampler": "dpmpp_2m_sde", "schedule": "karras", "guidance": 6.5, "seed": 3814829106,
                "size": (832, 1216), "clip_skip": 2,
            },
            [],
        ),
        (
            A1111_HIRES,
            like(
                steps=20, sampler="euler_a", schedule="normal", guidance=7.0, seed=1, size=(512, 512),
                hires={"scale": 2.0, "steps": 10, "upscaler": "latent-bilinear", "strength": 0.7},
            ),
            [],
        ),
        (
            A1111_OLD,
            like(steps=20, sampler="dpmpp_2m", schedule="karras", guidance=7.0, seed=1, size=(512, 768), eta=0.67),
            ["ENSD"],
        ),
        (
            A1111_INPAINT,
            like(
                prompt="a hat", steps=30, sampler="dpmpp_sde", schedule="karras", guidance=7.0, seed=5,
                size=(512, 512), strength=0.75, inpaint={"blur": 4, "padding": 32},
            ),
            ["Masked content"],
        ),
        (
            A1111_VARIATION,
            like(
                steps=20, sampler="heun", schedule="exponential", guidance=7.5, seed=1, size=(512, 512),
                variation={"seed": 42, "strength": 0.15},
            ),
            ["Seed resize from"],
        ),
        (
            FORGE,
            like(steps=20, sampler="euler", schedule="simple", guidance=1.0, seed=2, size=(896, 1152)),
            ["Distilled CFG Scale", "Module 1"],
        ),
        (
            IMAGE_SAVER,
            like(
                negative="blurry", steps=25, sampler="dpmpp_2m", schedule="karras", guidance=8.0, seed=9,
                size=(1024, 1024), clip_skip=1,
            ),
            [],
        ),
        (
            COMFY_NAMES,
            like(steps=25, sampler="euler_a", schedule="sgm_uniform", guidance=8.0, seed=9, size=(1024, 1024)),
            [],
        ),
        (
            CIVITAI,
            like(
                steps=30, sampler="euler_a", schedule="normal", guidance=7.0, seed=12, size=(832, 1216), clip_skip=2
            ),
            ["Civitai resources", "Civitai metadata"],
        ),
    ],
    ids=["1.10", "hires", "old", "inpaint", "variation", "forge", "image saver", "comfy names", "civitai"],
)  # fmt: skip
def test_real_texts(text, fields, ignored):
    assert read(text) == (fields, ignored)
    assert read(text.replace("\n", "\r\n"))[0] == fields


@pytest.mark.parametrize(
    ("sampler", "schedule", "ours"),
    [
        ("Euler a", None, ("euler_a", "normal")),
        ("Euler a", "Uniform", ("euler_a", "normal")),
        ("Euler", "Normal", ("euler", "normal")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE", "Automatic", ("dpmpp_2m_sde", "exponential")),
        ("Euler", "automatic", ("euler", "normal")),
        ("DPM++ 2M SDE Exponential", None, ("dpmpp_2m_sde", "exponential")),
        ("LMS Karras", None, ("lms", "karras")),
        ("UniPC", "Align Your Steps", ("unipc", "ays")),
        ("dpmpp_2m_sde_gpu", "karras", ("dpmpp_2m_sde", "karras")),
        ("uni_pc_bh2", "ddim_uniform", ("unipc", "leading")),
        ("dpmpp_2m_karras", None, ("dpmpp_2m", "karras")),
        ("dpm_2", "SGMUniform", ("dpm2", "sgm_uniform")),
        ("DDIM", "DDIM", ("ddim", "leading")),
        ("euler", "linear", ("euler", "linear")),
    ],
)
def test_samplers_and_schedules_by_all_their_names(sampler, schedule, ours):
    text = f"a\nSteps: 3, Sampler: {sampler}, Seed: 1" + (f", Schedule type: {schedule}" if schedule else "")
    found, _ = read(text)
    assert (found["sampler"], found["schedule"]) == ours


@pytest.mark.parametrize(
    ("change", "said", "argument", "skip"),
    [
        (
            "Sampler: Restart",
            "the sampler 'Restart', which is not here; choose one of euler",
            "sampler",
            {"sampler"},
        ),
        ("Sampler: res_multistep_beta", "the sampler 'res_multistep_beta'", "sampler", {"sampler"}),
        ("Sampler: DPM2 a", "the sampler 'DPM2 a'", "sampler", {"sampler"}),
        ("Sampler: Euler, Schedule type: KL Optimal", "the schedule 'KL Optimal'", "schedule", {"schedule"}),
        (
            "Hires upscale: 2, Hires upscaler: R-ESRGAN 4x+",
            "the upscaler 'R-ESRGAN 4x\\+', which is not here; choose one of latent",
            "hires.upscaler",
            {"hires.upscaler"},
        ),
        ("Hires resize: 100x70, Hires upscaler: Latent", "changes the shape", "hires.scale", {"hires.scale"}),
        ("Seed: x", "its Seed is 'x', which is no whole number", None, set()),
        ("Seed: 1.5", "its Seed is '1.5'", None, set()),
        ("CFG scale: much", "its CFG scale is 'much', which is no number", None, set()),
        ("Size: big", "its Size is 'big', which is no size", None, set()),
        ("Size: 0x8", "its Size is '0x8'", None, set()),
    ],
)
def test_what_is_not_here_is_named_unless_one_s_own_choice_stands_for_it(change, said, argument, skip):
    text = f"a\nSteps: 3, CFG scale: 2, Size: 64x64, {change}"
    with pytest.raises(InputError, match=said) as caught:
        read(text)
    assert caught.value.argument == argument
    if skip:
        found, _ = read(text, skip)
        assert found["steps"] == 3 and not skip & found.keys()


def test_a_resize_is_a_scale():
    found, _ = read("a\nSteps: 3, Seed: 1, Size: 64x48, Hires resize: 96x72, Denoising strength: 0.3")
    assert found["hires"] == {"scale": 1.5, "strength": 0.3}


def test_prompts_that_look_like_settings():
    assert split("Steps: 1, a: b\nSteps: 2, Seed: 3, CFG scale: 4")[::2] == (
        "Steps: 1, a: b",
        {"Steps": "2", "Seed": "3", "CFG scale": "4"},
    )
    assert split("only: two, settings: here") == ("only: two, settings: here", "", {})
    assert split("Steps: 2, Seed: 3, CFG scale: 4")[0] == ""
    with pytest.raises(InputError, match="its text holds no settings"):
        read("just a caption")


# --- in files ----------------------------------------------------------------------------------------------------


def save_with(path, text: str) -> None:
    if path.suffix == ".png":
        info = PngInfo()
        info.add_text("parameters", text)
        PICTURE.save(path, pnginfo=info)
        return
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    PICTURE.save(path, exif=exif)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_of_web_uis(tmp_path, suffix):
    save_with(tmp_path / f"a{suffix}", A1111_110)
    said = read_like(tmp_path / f"a{suffix}")
    assert (said.request, said.ignored) == read(A1111_110)
    assert (said.model, said.weights) == ("sd_xl_base_1.0", None)
    assert "steps" not in read_like(tmp_path / f"a{suffix}", {"steps"}).request


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_our_own_recipe_comes_first_and_says_more(tmp_path, suffix):
    request = Request(
        "a <script>alert('é')</script> & co",
        steps=3,
        image=PICTURE,
        outpaint=(8, 0, 0, 0),
        strength=0.3,
        seed=2,
    )
    recipe = {"request": request.to_dict(), "model": "tiny", "weights": {"net": "01"}}
    [file] = save_images(Result((PICTURE,), recipe), tmp_path / f"a{suffix}")
    said = read_like(file)
    assert said.request["image"] == fingerprint(PICTURE) and said.request["outpaint"] == [8, 0, 0, 0]
    assert (said.model, said.weights, said.ignored) == ("tiny", {"net": "01"}, [])
    assert Request.from_dict(said.request, [PICTURE]).to_dict() == request.to_dict()
    assert (
        b"<script>"
        not in re.sub(rb".*?<x:xmpmeta", b"<x:xmpmeta", file.read_bytes(), flags=re.S).split(b"</x:xmp")[0]
    )


def test_pictures_that_do_not_say(tmp_path):
    PICTURE.save(tmp_path / "plain.png")
    info = PngInfo()
    info.add_text("prompt", "{}")
    info.add_text("workflow", "{}")
    PICTURE.save(tmp_path / "comfy.png", pnginfo=info)
    save_with(tmp_path / "caption.jpg", "a nice photo: taken at noon")
    save_with(tmp_path / "sampler.webp", "a\nSteps: 3, Sampler: Restart, Seed: 1")
    info = PngInfo()
    info.add_text("sfumato", '{"request": 3}')
    PICTURE.save(tmp_path / "odd.png", pnginfo=info)
    cases = {
        "plain.png": "does not say how it was made$",
        "comfy.png": "does not say how it was made; a workflow of ComfyUI is not read",
        "caption.jpg": "its text holds no settings",
        "sampler.webp": r"sampler.webp: it was drawn with the sampler 'Restart'",
        "odd.png": "a recipe without a request",
        "absent.png": "does not exist",
    }
    for name, said in cases.items():
        with pytest.raises(InputError, match=said) as caught:
            read_like(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
