"""Stable Video Diffusion as a model: what it asks and refuses, memory and plans, and the verb that animates."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from helpers import hollow, relative_error, tiny_folder
from sfumato import planning
from sfumato.cli.app import run
from sfumato.drawing.clips import origin_of_clip
from sfumato.errors import InputError
from sfumato.families.published.openers import blank
from sfumato.families.svd.family import FAMILY
from sfumato.families.svd.shapes import IMAGE_ENCODER, SYSTEMS
from sfumato.families.svd.system import open_system
from sfumato.flops import count_flops
from sfumato.generate import Model, load
from sfumato.memory import LiveBytes
from sfumato.receipts.clips import read_recipe
from sfumato.receipts.work import by_stage, work_of
from sfumato.tasks.canvas import first_picture
from sfumato.tasks.pixels import to_image, to_pixels
from sfumato.types import Clip, Control, HiRes, Motion, Request, Variation
from sfumato.video.read import read_clip
from sfumato.video.write import staged, write_clip
from small_svd import SIZE, SMALL, original, picture, write

CPU = torch.device("cpu")
REQUEST = Request(image=picture(), seed=3, steps=2, frames=3)
LIGHT = ["--steps", "2", "--frames", "4", "--dtype", "fp32"]
PUBLISHED = dict(SYSTEMS)


def plain(value: object) -> str:
    """A name for a test that is the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write("svd", tmp_path_factory.mktemp("svd") / "model")


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """The small kinds in place of the published ones, and a folder with a picture alone."""
    monkeypatch.chdir(tmp_path)
    for kind, system in SMALL.items():
        monkeypatch.setitem(SYSTEMS, kind, system)
    picture((100, 60)).save("photo.png")
    return tmp_path


def opened(path: Path, dtype: torch.dtype = torch.float32, **options) -> Model:
    return Model(open_system(path, CPU, dtype, systems=SMALL, **options), CPU, "small")


def sampled(model: Model, request: Request = REQUEST) -> torch.Tensor:
    request = model.complete(request)
    return model.sample(model.condition(request), request.seeds(), request)


# --- requests ------------------------------------------------------------------------------------------------------


def test_what_a_request_leaves_open(place):
    request = opened(place).complete(Request(image=picture()))
    assert (request.frames, request.fps, request.guidance_first, request.guidance) == (14, 7, 1.0, 3.0)
    assert (request.steps, request.sampler, request.schedule, request.size) == (25, "euler", "karras", SIZE)
    assert request.fit == "cover" and request.strength is None and request.moves
    assert opened(place).complete(request) == request


def test_a_picture_is_brought_to_the_clip_s_size(place):
    model = opened(place)
    wide = Request(image=picture((200, 90)), frames=3)
    assert model.complete(wide).size == SIZE
    assert (
        model.complete(replace(wide, image=picture((90, 200)))).size == SIZE[::-1]
    )  # on end, as the picture is
    assert model.complete(replace(wide, image=picture((64, 64)))).size == SIZE
    complete = model.complete(replace(wide, size=(32, 48)))
    assert complete.size == (32, 48) and complete.image.size == (200, 90)
    shown = first_picture(complete)
    assert shown.size == (32, 48)
    stretched = first_picture(model.complete(replace(wide, size=(32, 48), fit="stretch")))
    assert np.abs(np.asarray(shown, int) - np.asarray(stretched, int)).mean() > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "'small' sets a picture in motion; give one by image"),
        ({"prompt": "a cat"}, "'small' reads no prompt; leave it out"),
        ({"negative": "blur"}, "'small' reads no negative; leave it out"),
        ({"strength": 0.5}, "strength is for pictures"),
        ({"mask": picture()}, "mask is for pictures"),
        ({"outpaint": (8, 8, 8, 8)}, "outpaint is for pictures"),
        ({"hires": HiRes(2)}, "hires is for pictures"),
        ({"variation": Variation(1, 0.5)}, "variation is for pictures"),
        ({"controls": (Control("canny", picture()),)}, "controls is for pictures"),
        ({"size": (63, 48)}, "size 63x48 is not a multiple of 4 pixels; the nearest legal size is 64x48"),
        ({"frames": 0}, "frames must be between 1 and 1000, not 0"),
        ({"frames": 2.5}, "frames must be a whole number"),
        ({"fps": 0.5}, "fps must be between 1 and 240, not 0.5"),
        ({"fps": float("nan")}, "fps must be between 1 and 240"),
        ({"guidance_first": -1.0}, "guidance_first must be between 0 and 100"),
        ({"motion": Motion(-1)}, "motion.bucket must be between 0 and 1023, not -1"),
        ({"motion": Motion(augment=float("inf"))}, "motion.augment must be between 0 and 10"),
        ({"motion": 127}, "motion must be of type Motion"),
        ({"reuse": 3}, "keeps no deep features"),
        ({"clip_skip": 2}, "clip_skip 2 is more than"),
        ({"prompt_rules": "comfy"}, "knows nothing of prompt_rules"),
    ],
    ids=plain,
)
def test_what_cannot_be_asked(place, changes, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        opened(place).complete(replace(REQUEST, **changes))


def test_a_model_of_pictures_knows_nothing_of_clips(tiny_model):
    for changes in ({"frames": 4}, {"fps": 7.0}, {"guidance_first": 1.0}, {"motion": Motion()}):
        with pytest.raises(InputError, match=f"knows nothing of {next(iter(changes))}"):
            tiny_model.complete(Request("a red cube", **changes))


@pytest.fixture(scope="module")
def tiny_model() -> Model:
    from helpers import tiny_system

    return Model(tiny_system(), CPU, "tiny")


def test_a_request_and_its_json(place):
    request = opened(place).complete(replace(REQUEST, motion=Motion(40, 0.1)))
    values = json.loads(json.dumps(request.to_dict()))
    assert values["motion"] == {"bucket": 40, "augment": 0.1} and values["frames"] == 3
    assert Request.from_dict(values, [request.image]) == request
    assert Request.from_dict({"motion": {"bucket": 3}}).motion == Motion(3)


# --- drawing -------------------------------------------------------------------------------------------------------


def test_what_each_number_changes(place):
    model = opened(place)
    base = sampled(model)
    assert base.shape == (1, 4, 3, 12, 16)
    for changes in (
        {"seed": 4},
        {"fps": 20.0},
        {"motion": Motion(10)},
        {"motion": Motion(127, 0.5)},
        {"guidance": 6.0},
        {"guidance_first": 2.0},
        {"image": picture(seed=1)},
    ):
        assert relative_error(sampled(model, replace(REQUEST, **changes)), base) > 1e-4, changes
    steady = sampled(model, replace(REQUEST, guidance_first=3.0, guidance=3.0))
    rising = sampled(model, replace(REQUEST, guidance_first=1.0, guidance=3.0))
    assert relative_error(rising, steady) > 1e-3


def test_a_clip_is_drawn_and_its_recipe_draws_it_again(place):
    model = opened(place)
    result = model.generate(replace(REQUEST, motion=Motion(40)))
    [clip] = result.clips
    assert isinstance(clip, Clip) and len(clip.frames) == 3 and clip.fps == 7 and clip.seconds == 3 / 7
    again = model.generate(Request.from_dict(result.recipe["request"], [REQUEST.image]))
    assert [f.tobytes() for f in again.clips[0].frames] == [f.tobytes() for f in clip.frames]
    assert set(result.recipe["weights"]) == {"autoencoder", "denoiser", IMAGE_ENCODER}


def test_a_single_frame_is_a_picture_s_worth(place):
    """The network takes one; `sfumato animate` wants more."""
    latent = sampled(opened(place), replace(REQUEST, frames=2))
    assert latent.shape[2] == 2


def test_what_is_kept_in_memory_changes_no_number(place):
    drawn = {offload: sampled(opened(place, offload=offload)) for offload in ("none", "model", "sequential")}
    assert torch.equal(drawn["none"], drawn["model"]) and torch.equal(drawn["none"], drawn["sequential"])


def test_one_network_at_a_time_is_in_memory(place):
    model = opened(place, offload="model")
    networks, seen, order = model.system.networks, [], []
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
    assert order == [IMAGE_ENCODER, "autoencoder", "denoiser", "autoencoder"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_narrower_types_stay_near(place, dtype):
    from sfumato.nn.quantized import can_quantize

    if dtype == torch.int8 and not can_quantize(torch.empty(1, dtype=torch.bfloat16)):
        pytest.skip("no eight-bit products here")
    exact = sampled(opened(place))
    assert relative_error(sampled(opened(place, dtype)).float(), exact) < 0.2


def test_a_preview_is_a_picture(place):
    model, seen = opened(place), []
    model.generate(REQUEST, on_step=lambda step: seen.append(model.preview(step.denoised)))
    assert len(seen) == 2 and all(image.size == (SIZE[0] // 4, SIZE[1] // 4) for image in seen)


# --- plans ---------------------------------------------------------------------------------------------------------


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
    found = planning.one(model, request, "model", 8 * 2**30)
    assert found.fits and model.complete(request).size == (1024, 576)
    weights = {stage.name: stage.weights for stage in found.stages}
    assert weights["denoise"] == pytest.approx(2 * 1_524_623_082, rel=0.05)
    assert weights["text"] == pytest.approx(2 * 632_076_800, rel=0.01)
    short = planning.one(model, replace(request, frames=7, size=(512, 288)), "model", None)
    assert short.peak < found.peak


# --- the verb ------------------------------------------------------------------------------------------------------


def animated(capsys, model: Path | str, *arguments: str) -> dict:
    assert run(["animate", "-m", str(model), *LIGHT, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    assert run(["animate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("out", ["out.mp4", "frames"])
def test_animate(small, place, capsys, out):
    answer = animated(capsys, place, "--image", "photo.png", "-o", out, "--seed", "9", "--motion", "60")
    assert (
        answer["files"] == [out] and answer["seeds"] == [9] and answer["frames"] == 4 and answer["fps"] == 7
    )
    clip = read_clip(out, fps=7)
    assert len(clip.frames) == 4 and clip.size == SIZE
    request = read_recipe(out)["request"]
    assert (request["seed"], request["motion"]["bucket"], request["guidance_first"]) == (9, 60, 1.0)
    assert sorted(os.listdir()) == sorted(["photo.png", out])


@pytest.mark.full
def test_animate_says_where_it_cropped_and_names_the_file(small, place, capsys):
    assert run(["animate", "-m", str(place), *LIGHT, "--image", "photo.png", "--guidance", "2:4"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "out.mp4\n"
    assert "photo.png is 100x60 and is cropped to the shape of 64x48" in captured.err
    request = read_recipe("out.mp4")["request"]
    assert (request["guidance_first"], request["guidance"], request["fit"]) == (2.0, 4.0, "cover")
    assert (
        run(["animate", "-m", str(place), *LIGHT, "--image", "photo.png", "--fit", "stretch", "-o", "b.gif"])
        == 0
    )
    assert capsys.readouterr().err == ""


@pytest.mark.full
def test_a_clip_like_another(small, place, capsys):
    animated(capsys, place, "--image", "photo.png", "--seed", "5", "--fps", "12", "-o", "a.webp")
    assert run(["animate", "-m", str(place), "--dtype", "fp32", "--like", "a.webp", "--image", "photo.png",
                "-o", "b.webp"]) == 0  # fmt: skip
    a, b = read_clip("a.webp"), read_clip("b.webp")
    assert [f.tobytes() for f in a.frames] == [f.tobytes() for f in b.frames]
    capsys.readouterr()
    assert "began with a picture; give that one" in refused(capsys, "-m", str(place), "--like", "a.webp")
    assert "carries no recipe of ours" in refused(capsys, "-m", str(place), "--like", "photo.png")


def test_animate_a_single_file(small, capsys):
    save_file(original(), "svd.safetensors")
    answer = animated(capsys, "svd.safetensors", "--image", "photo.png", "-n", "2", "-o", "x.gif")
    assert answer["files"] == ["x-0.gif", "x-1.gif"] and answer["seeds"] == [0, 1]


def test_animate_refuses_in_one_line(small, place, capsys, tmp_path_factory):
    svd = ["-m", str(place), "--dtype", "fp32"]
    assert "sets a picture in motion; give one by image" in refused(capsys, *svd)
    assert "does not exist" in refused(capsys, *svd, "--image", "none.png")
    assert "reads no prompt" in refused(capsys, "a cat", *svd, "--image", "photo.png")
    still = ["-m", str(tiny_folder(tmp_path_factory.mktemp("still")))]
    assert "draws pictures and no clips" in refused(capsys, "a cat", *still, "-o", "x.gif")
    assert "must end in .mp4" in refused(capsys, *svd, "--image", "photo.png", "-o", "x.png")
    assert "2 frames or more" in refused(capsys, *svd, "--image", "photo.png", "--frames", "1")
    assert "frames must be a whole number, not 'x'" in refused(capsys, *svd, "--frames", "x")
    assert "guidance must be a number, not 'a'" in refused(capsys, *svd, "--guidance", "a:3")
    assert "motion must be a whole number" in refused(capsys, *svd, "--motion", "lots")
    Path("text.png").write_text("hello")
    assert "text.png" in refused(capsys, *svd, "--image", "text.png")
    assert sorted(os.listdir()) == ["photo.png", "text.png"]
    assert run(["generate", "a", "-m", str(place)]) == 2
    assert "draws clips and no pictures; use sfumato animate" in capsys.readouterr().err


@pytest.mark.full  # a minute each
def test_animate_plans(small, place, capsys):
    svd = ["animate", "-m", str(place), "--dtype", "fp32", "--image", "photo.png"]
    assert run([*svd, "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan["stages"]) == {"load", "text", "denoise", "decode"} and plan["fits"]
    assert run([*svd, "--memory", "1MB", "--offload", "sequential"]) == 2
    assert "drawing 14 frames of 64x48 needs" in capsys.readouterr().err
    assert os.listdir() == ["photo.png"]


@pytest.mark.full  # a minute each
def test_convert_there_and_back(small, place, capsys):
    assert run(["convert", str(place), "svd.safetensors"]) == 0
    assert run(["convert", "svd.safetensors", "back"]) == 0
    assert sorted(p.name for p in Path("back").iterdir()) == [
        "feature_extractor", IMAGE_ENCODER, "model_index.json", "scheduler", "unet", "vae",
    ]  # fmt: skip
    assert run(["convert", "back", "svd.safetensors"]) == 2
    assert "exists" in capsys.readouterr().err


def test_inspect_tells_the_published_one(published, capsys):
    assert run(["inspect", str(published), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["family"] == "svd" and set(told["parts"]) == {"unet", "vae", IMAGE_ENCODER, "other"}
    assert told["parts"]["unet"]["parameters"] == 1_524_623_082


def test_an_interrupt_leaves_nothing(small, place):
    """Ctrl-C while it draws: exit code 130, one line, no file."""
    code = (
        "import sys; sys.path[:0] = sys.argv.pop(1).split(':')\n"
        "from sfumato.families.svd.shapes import SYSTEMS\nfrom small_svd import SMALL\n"
        "SYSTEMS.update(SMALL)\nfrom sfumato.cli.app import run\nsys.exit(run(sys.argv[1:]))"
    )
    tests = Path(__file__).resolve().parents[1]
    places = f"{tests}:{tests.parent / 'src'}"
    child = subprocess.Popen(
        [sys.executable, "-c", code, places, "animate", "-m", str(place), "--dtype", "fp32", "--image",
         "photo.png", "--fit", "cover", "--steps", "1000", "--frames", "40", "-o", "out.mp4", "--preview"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(1200):
        if Path("out-preview.png").exists() or child.poll() is not None:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "error: stopped\n")
    assert os.listdir() == ["photo.png"]


@pytest.mark.full
def test_pictures_in_files_of_other_forms(small, place, capsys):
    Image.new("RGBA", (70, 50), (10, 20, 30, 0)).save("clear.webp")
    animated(capsys, place, "--image", "clear.webp", "-o", "a.gif")
    Image.new("L", (1, 1)).save("dot.png")
    animated(capsys, place, "--image", "dot.png", "-o", "b.gif")


# --- beginning with a clip -----------------------------------------------------------------------------------------


def frames_of(count: int = 3, size: tuple[int, int] = SIZE) -> Clip:
    return Clip(tuple(picture(size, seed) for seed in range(count)), 12.0)


def test_what_a_clip_to_begin_with_leaves_open(place):
    request = opened(place).complete(Request(clip=frames_of(), steps=8))
    assert (request.frames, request.fps, request.strength, request.size) == (3, 12.0, 0.75, SIZE)
    assert request.image.tobytes() == request.clip.frames[0].tobytes()
    fewer = opened(place).complete(
        Request(clip=frames_of(4), frames=2, fps=7.0, image=picture(seed=9), steps=8)
    )
    assert (len(fewer.clip.frames), fewer.fps, fewer.image.tobytes()) == (2, 7.0, picture(seed=9).tobytes())
    values = json.loads(json.dumps(request.to_dict()))
    assert Request.from_dict(values, request.clip.frames) == request
    with pytest.raises(InputError, match="clip names 3 frames"):
        Request.from_dict({"clip": values["clip"]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 9}, "frames asks for 9, and the clip to begin with has 3"),
        ({"clip": Clip((picture(),), 7)}, "two frames or more"),
        ({"clip": Clip((picture(), picture((8, 8))), 7)}, "must have one size"),
        ({"clip": Clip((picture(), picture()), float("nan"))}, "a clip's fps must be between 0 and 240"),
        ({"clip": picture()}, "clip must be of type Clip"),
        ({"strength": 0.01}, "strength 0.01 of 8 steps is less than one step"),
        ({"clip": None, "image": picture(), "strength": 0.5}, "strength is for pictures"),
    ],
    ids=plain,
)
def test_clips_that_nothing_begins_with(place, changes, words):
    with pytest.raises(InputError, match=words):
        opened(place).complete(replace(Request(clip=frames_of(), steps=8), **changes))


def test_strength_goes_from_the_clip_itself_to_noise_alone(place):
    """0 is the clip through the autoencoder, 1 is the clip from noise to the bit, and between them it parts slowly."""
    model = opened(place)
    base = Request(clip=frames_of(), seed=3, steps=8)

    def drawn(strength: float) -> Clip:
        return model.generate(replace(base, strength=strength)).clips[0]

    encoded = model.encode_pixels(torch.stack([to_pixels(f)[:, 0] for f in base.clip.frames], 1)[None])
    through = model.decode_pixels(encoded)[0]
    kept = drawn(0.0)
    for number, frame in enumerate(kept.frames):
        assert (
            np.abs(np.asarray(frame, int) - np.asarray(to_image(through[:, number : number + 1]), int)).max()
            <= 1
        )
    alone = model.generate(Request(image=base.clip.frames[0], seed=3, steps=8, frames=3, fps=12.0)).clips[0]
    assert [f.tobytes() for f in drawn(1.0).frames] == [f.tobytes() for f in alone.frames]
    latents = []
    for strength in (0.25, 0.5, 0.75):
        request = model.complete(replace(base, strength=strength))
        origin = origin_of_clip(model, request)
        latents.append(model.sample(model.condition(request), request.seeds(), request, origin=origin))
    parted = [relative_error(latent, encoded) for latent in latents]
    assert parted == sorted(parted)


def test_animate_from_a_clip(small, place, capsys):
    with staged("in.gif") as target:
        write_clip(frames_of(5, (80, 60)), target, "gif", {})
    svd = ["-m", str(place), "--dtype", "fp32", "--steps", "4"]
    assert (
        run(["animate", *svd, "--init", "in.gif", "--strength", "0.5", "--frames", "3", "-o", "out.webp"])
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out == "out.webp\n" and captured.err == ""
    request = read_recipe("out.webp")["request"]
    assert request["strength"] == 0.5 and len(request["clip"]["frames"]) == 3
    assert read_clip("out.webp").fps == pytest.approx(12, rel=0.05)
    assert "began with a picture" in refused(capsys, *svd, "--like", "out.webp")
    picture((80, 60)).save("photo.png")
    assert "give that one, or a new one, by --init" in refused(
        capsys, *svd, "--like", "out.webp", "--image", "photo.png"
    )
    assert "init 'photo.png' is a picture" in refused(capsys, *svd, "--init", "photo.png")
    assert "init 'none.mp4' does not exist" in refused(capsys, *svd, "--init", "none.mp4")
