"""Detectors: their parts on exact cases, and both on real renders they never saw."""

from collections import deque

import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import CheckpointError, InputError
from sfumato.evaluate import detect_analytic as analytic
from sfumato.evaluate import detect_network as network
from sfumato.evaluate.ceiling import CHECK_SEED, _box, complete, pictures
from sfumato.evaluate.detect import SIDE, check_pixels
from sfumato.evaluate.score import score
from sfumato.evaluate.train_detector import batch_of, loss_of, make_pool, targets
from sfumato.scenes import sample_scene
from sfumato.storage import save_tensors

COUNT = 40


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(CHECK_SEED + 50_000 + seed, split="val") for seed in range(COUNT)]


@pytest.fixture(scope="module")
def shown(scenes):
    return pictures(scenes)


@pytest.fixture(scope="module")
def detector():
    return network.load_detector()


def share(detector, shown, scenes, column="strict"):
    found = [
        getattr(score(d, complete(s)), column) for d, s in zip(detector.detect(shown), scenes, strict=True)
    ]
    values = [v for v in found if v is not None]
    return sum(values) / len(values)


def test_the_network_reads_whole_scenes(detector, shown, scenes):
    assert share(detector, shown, scenes) >= 0.85
    assert share(detector, shown, scenes, "color") >= 0.97
    assert share(detector, shown, scenes, "relation") >= 0.97


def test_the_network_reads_soft_and_small_pictures(detector, shown, scenes):
    small = F.interpolate(shown, scale_factor=0.5, mode="area")
    assert share(detector, small, scenes, "color") >= 0.93
    assert share(detector, small, scenes, "count") >= 0.85


def test_scenes_are_not_taken_for_others(detector, shown, scenes):
    others = scenes[1:] + scenes[:1]
    assert share(detector, shown, others) == 0


def test_an_answer_does_not_depend_on_the_batch(detector, shown):
    def meaning(detections):
        return sorted((d.shape, d.color, d.material, d.size) for d in detections)

    together = detector.detect(shown[:6])
    assert [meaning(d) for d in together] == [meaning(detector.detect(shown[i : i + 1])[0]) for i in range(6)]


def test_an_empty_picture_holds_nothing(detector):
    grays = torch.linspace(-0.2, 0.6, 4)[:, None, None, None].expand(4, 3, SIDE, SIDE)
    assert detector.detect(grays) == [[], [], [], []]


def test_features_are_centred_on_real_scenes(detector, shown):
    features = detector.features(shown)
    assert features.shape[0] == COUNT and features.isfinite().all()
    assert features.mean().abs() < 0.2 and 0.5 < features.std() < 1.5


def test_the_weights_are_small():
    folder = network.weights_folder()
    assert (folder / "detector.safetensors").stat().st_size <= 2 * 2**20
    assert (folder / "detector.json").is_file()


def test_truth_written_as_maps_is_read_back():
    pool = make_pool(12, 300)
    labels = {"cells": pool["cells"], "words": pool["words"].long(), "floor": pool["floor"]}
    t = targets(labels)
    count, grid = len(pool["cells"]), network.GRID
    owner = t["owner"]
    pull = (t["centres"][..., None] - t["grid"]) / network.REACH
    maps = {
        "object": (owner.sum(1) * 20 - 10).view(count, 1, grid, grid),
        "heat": torch.where(t["peak"], 5.0, -5.0).view(count, 1, grid, grid),
        "offset": torch.einsum("bkn,bkcn->bcn", owner, pull).unflatten(2, (grid, grid)),
        "floor": torch.einsum("bkn,bkc->bcn", owner, labels["floor"] / network.SPAN).unflatten(
            2, (grid, grid)
        ),
    }
    for i, (name, words) in enumerate(network.WORDS.items()):
        one_hot = F.one_hot(labels["words"][..., i], len(words)).float()
        maps[name] = 20 * torch.einsum("bkn,bkc->bcn", owner, one_hot).unflatten(2, (grid, grid))
    found = network.decode(maps, 0.5)
    for b, detections in enumerate(found):
        number = int(pool["cells"][b].max())
        want = [
            tuple(w[int(k)] for w, k in zip(network.WORDS.values(), row, strict=True))
            for row in pool["words"][b]
        ]
        seen = [(d.shape, d.color, d.material, d.size) for d in detections]
        assert sorted(seen) == sorted(want[:number])
        places = sorted(zip(seen, [(d.right, d.away) for d in detections], strict=True))
        truth = sorted(zip(want[:number], pool["floor"][b, :number].tolist(), strict=True))
        for (_, near), (_, far) in zip(places, truth, strict=True):
            assert near == pytest.approx(far, abs=0.1)  # a cell of a neighbour may vote at an edge
    terms = loss_of(maps, labels)
    assert all(float(terms[n]) < 1e-3 for n in (*network.WORDS, "object", "offset", "floor"))


def test_training_pictures_carry_their_labels_when_mirrored_and_shifted():
    pool = make_pool(4, 300)
    for seed in range(8):
        _, labels = batch_of(pool, torch.arange(4), torch.Generator().manual_seed(seed))
        for b in range(4):
            same = torch.allclose(labels["floor"][b], pool["floor"][b])
            turned = torch.allclose(labels["floor"][b] * torch.tensor([-1.0, 1.0]), pool["floor"][b])
            assert same or turned
            area = labels["cells"][b].bool().sum() / pool["cells"][b].bool().sum()
            assert 0.7 < area <= 1.0


def test_regions_equal_a_flood_fill():
    classes = (torch.rand(3, 17, 23, generator=torch.Generator().manual_seed(0)) * 3).long()
    labels = analytic.components(classes)
    for b in range(3):
        seen = torch.zeros_like(classes[b])
        number = 0
        for y in range(17):
            for x in range(23):
                if classes[b, y, x] == 0 or seen[y, x]:
                    assert (classes[b, y, x] == 0) == (labels[b, y, x] == 0)
                    continue
                number += 1
                queue, cells = deque([(y, x)]), []
                seen[y, x] = number
                while queue:
                    v, u = queue.popleft()
                    cells.append((v, u))
                    for dv in (-1, 0, 1):
                        for du in (-1, 0, 1):
                            p, q = v + dv, u + du
                            inside = 0 <= p < 17 and 0 <= q < 23
                            if inside and not seen[p, q] and classes[b, p, q] == classes[b, y, x]:
                                seen[p, q] = number
                                queue.append((p, q))
                assert len({int(labels[b, v, u]) for v, u in cells}) == 1
        assert len(labels[b].unique()) - int((labels[b] == 0).any()) == number


def test_perspective_gives_size_and_place(scenes):
    right, total, errors = 0, 0, []
    for scene in scenes:
        for obj in scene.objects:
            size, *spot = analytic.place(obj.shape, _box(scene, obj)[:4])
            right += size == obj.size
            total += 1
            true = scene.camera.floor_axes(*obj.position[:2])
            errors.append(max(abs(a - b) for a, b in zip(spot, true, strict=True)))
    assert right / total >= 0.98
    assert (
        sorted(errors)[int(0.9 * len(errors))] < 1.0
    )  # cameras vary by ±7 degrees; what counts is the order


def test_the_floor_is_found_under_objects(shown, scenes):
    light = analytic.linear_log(shown[:8])
    floor = analytic.empty_floor(light)
    gap = (light - floor).abs().mean(1).flatten(1)
    assert gap.median(dim=1).values.max() < 0.05  # most of a picture is floor


@pytest.mark.parametrize("shape", [(3, SIDE, SIDE), (1, 4, SIDE, SIDE), (1, 3, 2, SIDE, SIDE)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(InputError):
        check_pixels(torch.zeros(shape))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_tensors(tmp_path / "detector.safetensors", {"heads.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="does not fit"):
        network.load_detector(folder=tmp_path)
    with pytest.raises(CheckpointError):
        network.load_detector(folder=tmp_path / "nowhere")
