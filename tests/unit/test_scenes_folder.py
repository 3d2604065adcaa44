"""Folders of scenes and labels of cells."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import Cancelled, InputError
from sfumato.scenes import COLORS, SHAPES, SIZES, cell_labels, holds, render, sample_scene
from sfumato.scenes.captions import ObjectClaim, RelationClaim, Statement
from sfumato.scenes.folder import DEPTH_SCALE, write_folder
from sfumato.scenes.graph import scene_from_dict


def test_a_folder_holds_pictures_words_and_truth(tmp_path):
    out, seen = tmp_path / "world", []
    write_folder(
        out, 18, seed=40, size=48, split="pairs", on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(16, 18), (18, 18)]
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == sorted(
        f"{k:05d}.{kind}" for k in range(18) for kind in ("png", "txt")
    )
    for k in (0, 17):
        scene = sample_scene(40 + k, split="pairs")
        made = render([scene], 48)
        rgb = np.asarray(Image.open(out / f"{k:05d}.png"))
        assert np.array_equal(rgb, made.rgb[0, :, 0].permute(1, 2, 0).mul(255).round().byte().numpy())
        assert np.array_equal(
            np.asarray(Image.open(out / "mask" / f"{k:05d}.png")), made.instances[0, 0].numpy()
        )
        depth = np.asarray(Image.open(out / "depth" / f"{k:05d}.png"))
        assert (
            np.abs(depth / DEPTH_SCALE - made.depth[0, 0].clamp(max=65.535).numpy()).max()
            <= 0.51 / DEPTH_SCALE
        )
        graph = json.loads((out / "graphs" / f"{k:05d}.json").read_text())
        assert scene_from_dict(graph["scene"]) == scene
        assert (out / f"{k:05d}.txt").read_text() == graph["caption"] + "\n"
        said = graph["statement"]
        statement = Statement(
            tuple(ObjectClaim(**c) for c in said["objects"]),
            tuple(RelationClaim(**r) for r in said["relations"]),
            said["exact"],
        )
        assert holds(statement, scene)
        assert graph["split"] == "pairs" and graph["seed"] == 40 + k


def test_a_stopped_folder_leaves_nothing(tmp_path):
    def stop(done, total):
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        write_folder(tmp_path / "world", 20, size=16, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="empty"):
        write_folder(tmp_path, 1, size=16)
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 1, "split": "none"}, {"count": 1, "size": 2}])
def test_bad_arguments_write_nothing(tmp_path, options):
    with pytest.raises(InputError):
        write_folder(tmp_path / "world", **options)
    assert list(tmp_path.iterdir()) == []


def test_labels_name_the_object_of_each_cell():
    scenes = [sample_scene(s) for s in range(12)]
    instances = render(scenes, 64, antialias=False).instances
    labels = cell_labels(scenes, instances, 8)
    assert labels.shape == (12, 4, 8, 8) and labels.dtype == torch.int64
    for b, scene in enumerate(scenes):
        for y in range(8):
            for x in range(8):
                cell = instances[b, 0, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                shares = [int((cell == k + 1).sum()) for k in range(len(scene.objects))]
                best = max(shares)
                if best < 16:
                    assert (labels[b, :, y, x] == 0).all()
                elif shares.count(best) == 1:
                    obj = scene.objects[shares.index(best)]
                    assert labels[b, 0, y, x] == 1 + SHAPES.index(obj.shape)
                    assert labels[b, 1, y, x] == 1 + COLORS.index(obj.color)
                    assert labels[b, 3, y, x] == 1 + SIZES.index(obj.size)
    assert (labels > 0).any()


def test_labels_do_not_depend_on_the_batch():
    scenes = [sample_scene(s) for s in range(6)]
    instances = render(scenes, 64, antialias=False).instances
    together = cell_labels(scenes, instances, 16)
    for k in range(6):
        assert torch.equal(cell_labels(scenes[k : k + 1], instances[k : k + 1], 16), together[k : k + 1])
    assert torch.equal(cell_labels(scenes, instances[:, 0], 16), together)
