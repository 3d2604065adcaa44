"""Control pictures made by networks: as transformers makes them, from folders that are refused where they must be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import small_annotators
import small_control as small
from helpers import noise
from sfumato.cli.app import run
from sfumato.errors import CheckpointError, InputError
from sfumato.memory import LiveBytes
from sfumato.receipts.provenance import read_recipe
from sfumato.serve.asked import PICTURE
from sfumato.serve.settings import read_models
from sfumato.serve.worker.models import open_model
from sfumato.serve.worker.together import Bench, Together
from sfumato.tasks.annotators import Entrance, depth_picture, open_annotator
from sfumato.tasks.poses import COLORS, FAINT, ORDER, points_of, pose_picture
from sfumato.types import Control, Request
from small_sd import stand_for_the_published, write


@pytest.mark.parametrize("kind", ["dpt", "depth_anything"])
@pytest.mark.parametrize("size", [(40, 40), (90, 50)])
def test_depth_is_what_transformers_tells(tmp_path, kind, size):
    from transformers import AutoModelForDepthEstimation
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    folder = getattr(small_annotators, kind)(tmp_path / kind)
    picture = noise(*size, seed=3)
    ours = open_annotator(folder)(picture)
    said = {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
    }
    if kind == "depth_anything":
        said = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = DPTImageProcessorPil(**said)(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        depth = AutoModelForDepthEstimation.from_pretrained(folder).eval()(pixels).predicted_depth
    right = torch.nn.functional.interpolate(depth[None], size[::-1], mode="bicubic")[0, 0]
    right = (right - right.min()) / (right.max() - right.min()) * 255
    assert ours.size == size and ours.mode == "RGB"
    assert np.abs(np.asarray(ours)[..., 0].astype(float) - right.floor().numpy()).max() <= 1
    assert np.asarray(ours).min() == 0 and np.asarray(ours).max() >= 254


def test_near_is_bright_of_metric_depth_too():
    depth = torch.tensor([[[1.0, 1.0, 4.0, 4.0]] * 4])
    told, metric = (np.asarray(depth_picture(depth, (4, 4), way))[0, :, 0] for way in (False, True))
    assert told[0] < told[3] and metric[0] > metric[3]


@pytest.mark.parametrize(
    ("size", "right"), [((518, 518), (518, 518)), ((640, 480), (686, 518)), ((200, 1000), (98, 518))]
)
def test_sides_keep_their_proportion(size, right):
    wide, high = Entrance((518, 518), True, 14).size(*size)
    assert wide % 14 == high % 14 == 0
    if size != (200, 1000):
        assert (wide, high) == right
    assert wide / high == pytest.approx(size[0] / size[1], rel=0.1)


def test_a_pose_is_drawn_where_its_points_are():
    heat = torch.zeros(17, 16, 12)
    at = {0: (6, 2), 5: (8, 5), 6: (4, 5), 7: (9, 8), 8: (3, 8), 11: (7, 9), 12: (5, 9)}
    for k, (x, y) in at.items():
        heat[k, y, x] = 0.9
    found = points_of(heat)
    for k, (x, y) in at.items():
        assert found[k] == pytest.approx(((x + 0.5) / 12, (y + 0.5) / 16, 0.9))
    drawn = np.asarray(pose_picture(heat, (120, 160)))
    for place, k in enumerate(ORDER):
        if k in at:
            x, y = at[k]
            assert tuple(drawn[y * 10 + 5, x * 10 + 5]) == COLORS[place]
    assert tuple(drawn[55, 65]) == COLORS[1]  # the neck lies between the shoulders
    assert tuple(drawn[40, 65]) == tuple(round(FAINT * c) for c in COLORS[12])  # and below the nose
    assert not drawn[130:].any()  # of knees nothing is known
    with pytest.raises(CheckpointError, match="a pose of 3 points"):
        points_of(torch.zeros(3, 4, 4))


def test_a_network_of_poses_is_shown_the_whole_picture(tmp_path):
    from transformers import VitPoseForPoseEstimation

    folder = small_annotators.vitpose(tmp_path / "pose")
    picture, found = noise(60, 90, seed=5), open_annotator(folder)
    with torch.no_grad():
        network = VitPoseForPoseEstimation.from_pretrained(folder).eval()
        heat = network(found.entrance.pixels(picture)).heatmaps[0]
    assert found.entrance.sides == (64, 48) and heat.shape[0] == 17
    assert np.array_equal(np.asarray(found(picture)), np.asarray(pose_picture(heat, (60, 90))))


def test_what_is_refused(tmp_path):
    good = small_annotators.dpt(tmp_path / "good")

    def broken(name: str, config: dict | None = None, tensors=None) -> Path:
        place = small_annotators.dpt(tmp_path / name)
        if config is not None:
            said = json.loads((place / "config.json").read_text())
            (place / "config.json").write_text(json.dumps(said | config))
        if tensors is not None:
            save_file(tensors(load_file(place / "model.safetensors")), place / "model.safetensors")
        return place

    for place, said in (
        (tmp_path / "gone", "is no folder"),
        (broken("code", {"auto_map": {"AutoModel": "x.Y"}}), "code"),
        (broken("none", {"model_type": ""}), "holds no network that makes control pictures here"),
        (broken("other", {"model_type": "clip"}), "holds a clip, which makes no control pictures here"),
        (broken("away", {"backbone": "microsoft/resnet-50"}), "names a backbone to be fetched"),
        (broken("nan", None, lambda t: t | {next(iter(t)): next(iter(t.values())) * float("nan")}), "NaN"),
    ):
        with pytest.raises(CheckpointError, match=said):
            open_annotator(place)
    pickled = broken("pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle"):
        open_annotator(pickled)
    lacking = broken("lacking", None, lambda t: dict(list(t.items())[1:]))
    with pytest.raises(CheckpointError, match="1 tensors of DPTForDepthEstimation are not there"):
        open_annotator(lacking)(noise(32, 32))
    assert (
        open_annotator(good).digest != open_annotator(small_annotators.dpt(tmp_path / "two", seed=1)).digest
    )


@pytest.mark.full
def test_the_command_line_makes_depth_of_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stand_for_the_published(monkeypatch)
    write("sd1", Path("m"))
    small.file(Path("depth.safetensors"), "sd1")
    folder = small_annotators.dpt(Path("dpt"))
    noise(32, 32, seed=1).save("photo.png")
    open_annotator(folder)(Image.open("photo.png")).save("ready.png")
    light = [
        "-m",
        "m",
        "--steps",
        "2",
        "--size",
        "32",
        "--dtype",
        "fp32",
        "--controlnet",
        "depth=depth.safetensors",
    ]

    def draw(*arguments: str, out: str) -> np.ndarray:
        assert run(["generate", "a cat", *light, *arguments, "-o", out]) == 0, capsys.readouterr().err
        return np.asarray(Image.open(out))

    makes = ["--annotator", "depth=dpt", "--control", "depth=photo.png"]
    assert run(["generate", "a cat", *light, *makes, "--plan", "--json", "-o", "no.png"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert list(stages)[-3:] == ["annotate", "denoise", "decode"]
    assert stages["annotate"]["activations"] == open_annotator(folder).memory(Image.open("photo.png").size)
    made = draw(*makes, out="made.png")
    assert np.array_equal(made, draw("--control", "depth=ready.png", out="a.png"))
    assert not np.array_equal(made, draw("--control", "depth=photo.png", out="b.png"))
    recipe = read_recipe("made.png")
    assert recipe["annotators"] == {"depth": open_annotator(folder).digest}
    assert recipe["request"]["controls"][0]["prepare"] == "depth"
    assert "annotators" not in read_recipe("a.png")
    assert run(["generate", "--like", "made.png", *light, *makes, "-o", "again.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), made)
    small_annotators.dpt(Path("dpt"), seed=4)
    capsys.readouterr()
    assert run(["generate", "--like", "made.png", *light, *makes, "-o", "other.png"]) == 0
    assert "drawn with another annotator 'depth'" in capsys.readouterr().err
    assert run(["generate", "--like", "made.png", *light, "--control", "depth=photo.png", "-o", "c.png"]) == 2
    assert "--annotator depth=FOLDER" in capsys.readouterr().err
    assert run(["generate", "a cat", *light, "--annotator", "depth=dpt", "-o", "c.png"]) == 2
    assert "annotator names 'depth', which no --control gives" in capsys.readouterr().err
    replay = [
        "replay",
        "made.png",
        "-m",
        "m",
        "--picture",
        "photo.png",
        "--controlnet",
        "depth=depth.safetensors",
    ]
    assert run([*replay, "--annotator", "depth=dpt", "--json"]) == 0
    assert "annotators" in capsys.readouterr().out


def test_a_name_that_no_network_answers_to():
    from sfumato.tasks.hints import prepare_named

    with pytest.raises(InputError, match="one of canny, softedge, pose, or left out"):
        prepare_named("depth", {"pose": lambda picture: picture})


@pytest.mark.parametrize(
    "write", [small_annotators.dpt, small_annotators.depth_anything, small_annotators.vitpose]
)
def test_what_it_takes_is_known_before_it_is_opened(tmp_path, write):
    found = open_annotator(write(tmp_path / "net"))
    network, pixels = found._network(), found.entrance.pixels(Image.new("RGB", (200, 120)))
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    with torch.inference_mode(), LiveBytes() as live:
        _, beside = live.worst(lambda: network(pixels))
    told = found.memory((200, 120)) - weights
    assert beside <= told <= beside + 2 * pixels.nbytes


def test_a_server_has_annotators_by_the_names_of_its_models_file(tmp_path):
    net = small_annotators.dpt(tmp_path / "net")
    (tmp_path / "models.toml").write_text(
        f'[[model]]\nname = "pocket"\nsource = "pocket"\ndtype = "fp32"\n[model.annotators]\ndepth = "{net}"\n'
    )
    (spec,) = read_models(tmp_path / "models.toml")
    together = Together(Bench(torch.device("cpu")), 2)
    opened = open_model(spec, "cpu", together, None)
    assert opened.facts()["annotators"] == ["depth"]
    control = Control("depth", Image.new("RGB", (64, 64), "red"), prepare="depth")
    request = opened.asked(Request("a cat", size=(64, 64), steps=1, controls=(control,)), PICTURE)
    made = opened.shared.generate(request)
    together.leave()
    assert made.recipe["annotators"] == {"depth": open_annotator(net).digest}
