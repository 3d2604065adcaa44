"""Reports on models whose quality is known: one that draws the truth, one that draws nothing, one that copies."""

import json

import pytest
import torch

from sfumato.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.errors import InputError
from sfumato.evaluate.ceiling import pictures, scene_of
from sfumato.evaluate.detect_network import load_detector
from sfumato.evaluate.report import (
    distribution_report,
    draw,
    evaluate_model,
    neighbours,
    reconstruction_report,
)
from sfumato.evaluate.score import COLUMNS
from sfumato.evaluate.tasks import task_groups
from sfumato.scenes import sample_scene

GROUPS = ["colors", "relations"]
COUNT = 12


class Truth:
    """Draws a real render of whatever the prompt of these groups states."""

    def __init__(self, names, count, seed=0):
        self.known = {t.prompt: t.statement for ts in task_groups(count, seed, names).values() for t in ts}

    def generate_pixels(self, prompts, seeds, **changes):
        return pictures([scene_of(self.known[p], s) for p, s in zip(prompts, seeds, strict=True)])


class Blank:
    def generate_pixels(self, prompts, seeds, **changes):
        return torch.full((len(prompts), 3, 128, 128), 0.3)


@pytest.fixture(scope="module")
def detector():
    return load_detector()


@pytest.fixture(scope="module")
def truthful(detector):
    return evaluate_model(Truth(GROUPS, COUNT), GROUPS, COUNT, detectors=[detector])


def test_a_truthful_model_reaches_the_ceiling(truthful):
    for group in GROUPS:
        found, limits = truthful.scores[group]["network"], truthful.bounds[group]["network"]
        assert found["strict"].mean >= 0.9 and limits["ceiling"].mean >= 0.9
        assert limits["floor"].mean <= 0.1
        assert found["strict"].low <= found["strict"].mean <= found["strict"].high
        assert truthful.agreement[group] == 1.0  # one detector agrees with itself
    assert "relation" not in truthful.scores["colors"]["network"]
    assert truthful.scores["relations"]["network"]["relation"].mean >= 0.9


def test_a_blank_model_scores_nothing(detector):
    report = evaluate_model(Blank(), GROUPS, 6, detectors=[detector], with_bounds=False)
    assert all(report.scores[g]["network"]["strict"].mean == 0 for g in GROUPS)
    assert report.bounds == {}


def test_a_report_is_json_and_a_table(truthful):
    assert json.loads(json.dumps(truthful.to_dict(), allow_nan=False))["settings"]["per_group"] == COUNT
    columns, rows = truthful.table()
    assert len(rows) == len(GROUPS) and all(len(row) == len(columns) for row in rows)
    assert all(name in columns for name in COLUMNS)


def test_progress_and_seeds_of_drawing():
    heard, used = [], []

    class Listens(Blank):
        def generate_pixels(self, prompts, seeds, **changes):
            used.append((list(seeds), changes))
            return super().generate_pixels(prompts, seeds)

    tasks = task_groups(40, 0, ["three"])["three"]
    draw(Listens(), "three", tasks, 5, 8, None, lambda *event: heard.append(event))
    draw(Listens(), "three", tasks[:10], 5, 8, None)
    assert used[0][0][:10] == used[2][0]  # picture i has its seed whatever the count
    assert used[0][1] == {"steps": 8, "guidance": None}
    assert heard[0] == ("drawing three", 0, 40) and heard[-1] == ("drawing three", 40, 40)


def test_copies_of_training_pictures_are_found(detector):
    training = pictures([sample_scene(seed) for seed in range(60)])
    real = pictures([sample_scene(seed, split="val") for seed in range(40)])
    copied = neighbours(detector, training[:40] + 0.01, real, training)
    fresh = neighbours(detector, pictures([sample_scene(5000 + s) for s in range(40)]), real, training)
    for space in ("features", "pixels"):
        assert copied[space]["copying_z"] < -5 and copied[space]["closer"] == 1.0
        assert copied[space]["closest"]["picture"] == copied[space]["closest"]["training"]
        assert abs(fresh[space]["copying_z"]) < 3.5
    with pytest.raises(InputError):
        neighbours(detector, real, real, training[0])


def test_distribution_of_a_blank_model_is_far_from_real(detector):
    result = distribution_report(Blank(), 24, detector=detector)
    assert result["model"]["frechet_distance"] > 3 * result["real"]["frechet_distance"]
    assert result["model"]["kernel_distance"] > 10 * abs(result["real"]["kernel_distance"])
    assert result["diversity"]["model_spread"] == 0 < result["diversity"]["real_spread"]
    json.dumps(result, allow_nan=False)


def test_the_identity_loses_nothing_and_a_poor_autoencoder_much(detector):
    exact = reconstruction_report(Autoencoder(AutoencoderConfig(factor=1)), 8, detectors=[detector])
    assert exact["psnr"]["mean"] == 120 and exact["ssim"]["mean"] == pytest.approx(1.0)
    assert exact["scene"]["network"]["render"] == exact["scene"]["network"]["reconstruction"]
    torch.manual_seed(0)
    poor = reconstruction_report(Autoencoder(AutoencoderConfig(factor=8)), 4, detectors=[detector])
    assert poor["psnr"]["mean"] < 25 and poor["scene"]["network"]["reconstruction"]["strict"]["mean"] == 0
    json.dumps([exact, poor], allow_nan=False)


def test_an_unknown_group_is_refused(detector):
    with pytest.raises(InputError, match="unknown"):
        evaluate_model(Blank(), ["nonsense"], 2, detectors=[detector])
