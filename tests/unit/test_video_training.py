"""Clips in training: batches are what the recipe says, nothing changes the base, a stopped run goes on to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import noise
from sfumato import load
from sfumato.data.clips import ClipFolder
from sfumato.errors import DataError, InputError
from sfumato.families.pocket import continued_video, fresh_video, save_folder
from sfumato.train import run
from sfumato.train.recipe import read_recipe
from sfumato.train.video import VideoJob
from sfumato.train.video_data import PICTURE, ClipBatch, Clips
from sfumato.train.video_tasks import film_loss
from sfumato.types import Clip, Request
from sfumato.video.write import staged, write_clip
from small_video import VIDEO, picture_system

RECIPE = """
name = "v"
[data]
kind = "scenes"
size = 32
count = 12
objects = [1, 3]
[video]
base = "BASE"
frames = 13
short = 9
mix = [1, 2, 1]
[video.temporal]
width = 16
encoder_blocks = 1
decoder_blocks = 2
[video.codec]
steps = 4
batch = 4
lr = 1e-3
[video.train]
steps = 4
batch = 8
microbatch = 2
decay = 0.0
save_every = 2
sheet_every = 100
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    save_folder(picture_system(), tmp_path / "base")
    path = tmp_path / "v.toml"
    path.write_text(RECIPE.replace("BASE", str(tmp_path / "base")))
    return path


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_bit_and_its_model_draws(recipe, tmp_path):
    def stop(event):
        if event.kind == "step" and event.stage == "video" and event.step == 3:
            raise Stop

    whole = run(recipe, out=tmp_path / "whole")
    with pytest.raises(Stop):
        run(recipe, out=tmp_path / "parts", on_event=stop)
    parts = run(recipe, out=tmp_path / "parts")
    models = [load(place) for place in (whole, parts)]
    assert models[0].clip_hashes == models[1].clip_hashes
    assert models[0].hashes == load(tmp_path / "base").hashes  # pictures are drawn by the base's own weights
    drawn = models[0].generate(Request("a red cube rolls left", frames=9, steps=2)).clips[0]
    assert len(drawn.frames) == 9
    words = models[0].system.config.video.words
    assert {"rolls", "slides", "bounces"} & set(words) and "cube" not in words


def test_steps_may_be_added_and_another_recipe_is_refused(recipe, tmp_path):
    run(recipe, out=tmp_path / "run")
    run(recipe, out=tmp_path / "run", overrides={"video.train.steps": 6})
    with pytest.raises(Exception, match="another recipe"):
        run(recipe, out=tmp_path / "run", overrides={"video.loss.mean": 1.0, "video.train.steps": 8})


def clips_of(recipe: Path, tmp_path: Path) -> Clips:
    job = VideoJob(read_recipe(recipe), tmp_path / "run", torch.device("cpu"), lambda event: None)
    source = job.clips("train", 12)
    system = job.family.fresh_video(job.base, job.config(source))
    latents = torch.randn(12, 4, 4, 4, 4).half()
    patch = job.base.config.denoiser.patch
    return Clips(source, latents, system.clip_tokenizer, job.own, 0, torch.device("cpu"), patch)


def test_a_step_mixes_pictures_windows_and_whole_clips(recipe, tmp_path):
    clips = clips_of(recipe, tmp_path)
    parts = [clips.part(1, part) for part in range(4)]
    assert [part.latents.shape[2] for part in parts] == [1, 3, 3, 4]
    again = clips.part(1, 2)
    assert torch.equal(again.latents, parts[2].latents) and torch.equal(again.ids, parts[2].ids)
    assert not parts[0].known.any()
    known = torch.cat([clips.part(step, part).known for step in range(1, 30) for part in (1, 2, 3)])
    shares = [float((known == k).double().mean()) for k in range(3)]
    assert 0.35 < shares[0] < 0.65 and shares[1] > 0.15 and shares[2] > 0.08


def test_windows_of_clips_are_cut_out_of_them(recipe, tmp_path):
    clips = clips_of(recipe, tmp_path)
    for step in range(1, 20):
        batch = clips.part(step, 1)
        for latents, known in zip(batch.latents, batch.known, strict=True):
            places = [
                at
                for row in clips.latents.float()
                for at in range(2)
                if torch.equal(row[:, at : at + 3], latents)
            ]
            assert len(places) == 1 and (places == [0] or known > 0)


def test_what_is_known_is_shown_clean_and_asked_for_nothing(recipe, tmp_path):
    clips = clips_of(recipe, tmp_path)
    batch = clips.part(1, 3)
    batch = type(batch)(batch.latents, batch.ids, batch.mask, torch.tensor([0, 2]))
    told = {}

    def net(x, time, ids, mask, seen):
        told.update(x=x, time=time)
        answer = torch.zeros_like(x)
        answer[1, :, :2] = 1e6  # wrong where nothing is asked
        return answer

    loss = film_loss(net, batch, clips.recipe, torch.Generator().manual_seed(0))
    assert float(loss) < 100
    assert torch.equal(told["x"][1, :, :2], batch.latents[1, :, :2])
    assert (told["time"][1, :2] == 0).all() and (told["time"][1, 2] > 0) and (told["time"][0] > 0).all()


def test_short_windows_may_show_a_part_of_a_clip_and_only_that_is_asked_for(recipe, tmp_path):
    """Three latents of four, the first among them, and a row of two: the one in which something moves."""
    clips = clips_of(recipe, tmp_path)
    loss = replace(clips.recipe.loss, known=(0.3, 0.4, 0.3))
    clips.patch, clips.recipe = 2, replace(clips.recipe, rows=1, loss=loss)
    clips.latents[:] = clips.latents[:, :, :1]  # nothing moves
    clips.latents[:, :, 1:, 2:, :2] += 5  # but in the lower row
    known = set()
    for step in range(1, 12):
        batch = clips.part(step, 1)
        assert batch.latents.shape[2:] == (4, 4, 4) and batch.seen.shape == (2, 3 * 2)
        for k in range(2):
            frames, tokens = (batch.seen[k] // 4).unique().tolist(), set((batch.seen[k] % 4).tolist())
            assert frames[0] == 0 and len(frames) == 3 and tokens == {2, 3}
            assert int(batch.known[k]) in (0, 1, frames[1] + 1)
            known.add((0, 1, frames[1] + 1).index(int(batch.known[k])))
            assert batch.shown[k].nonzero().tolist() == [
                [t, y, x] for t in frames for y in (2, 3) for x in range(4)
            ]

        def net(x, time, ids, mask, seen, batch=batch):
            return torch.where(batch.shown[:, None], torch.zeros_like(x), 1e6)

        assert float(film_loss(net, batch, clips.recipe, torch.Generator().manual_seed(0))) < 1000
    assert known == {0, 1, 2}


def test_a_model_that_learnt_no_clips_from_nothing_draws_their_first_frame_alone(recipe, tmp_path):
    changes = {"video.rows": 1, "video.loss.known": [0.0, 0.8, 0.2]}
    model = load(run(recipe, out=tmp_path / "run", overrides=changes))
    assert model.system.first_alone
    steps = []
    asked = Request("a red cube rolls left", frames=9, steps=2, seed=1)
    clip = model.generate(asked, lambda step: steps.append((step.index, step.total))).clips[0]
    assert len(clip.frames) == 9 and steps == [(k, 4) for k in range(4)]
    begun = model.generate(replace(asked, image=clip.frames[0]), lambda step: steps.append(step.total))
    assert len(begun.clips[0].frames) == 9 and steps[4:] == [2, 2]


def test_a_picture_may_be_the_first_frame_of_a_clip_by_its_caption(recipe, tmp_path):
    """Half of them are where a first frame is drawn as a picture, and none elsewhere."""
    clips = clips_of(recipe, tmp_path)
    asked: list[int | None] = []
    caption = clips.source.caption

    def listening(index, epoch=0, frames=None):
        asked.append(frames)
        return caption(index, epoch, frames)

    clips.source.caption = listening
    for known, share in (((0.5, 0.5), 0.0), ((0.0, 1.0), 0.5)):
        asked.clear()
        clips.recipe = replace(clips.recipe, loss=replace(clips.recipe.loss, known=known))
        for index in range(200):
            clips._row(index % 12, 0, PICTURE, [0.0, index / 200, 0.9])
        assert asked.count(None) / len(asked) == share and set(asked) <= {1, None}


def test_what_moves_counts_more_where_that_is_asked(recipe, tmp_path):
    """A still clip's loss is the same whatever `moving` is; an error where something has moved counts more with it."""
    own = read_recipe(recipe).video
    moved = torch.zeros(1, 4, 3, 4, 4)
    moved[:, :, 1:, 0, 0] = 3.0

    def loss(latents: torch.Tensor, moving: float) -> float:
        batch = ClipBatch(latents, torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), torch.tensor([1]))
        error = torch.zeros(4, 4)
        error[0, 0] = 1.0  # wrong in one cell

        def net(x, time, ids, mask, seen):
            level = time.clamp(min=1e-3).view(1, 1, -1, 1, 1)
            return (x - latents) / level + error  # the flow itself, and an error

        changed = replace(own, loss=replace(own.loss, moving=moving))
        return float(film_loss(net, batch, changed, torch.Generator().manual_seed(0)))

    assert loss(torch.zeros(1, 4, 3, 4, 4), 5.0) == pytest.approx(1 / 16, rel=1e-3)
    assert loss(moved, 0.0) == pytest.approx(1 / 16, rel=1e-3)
    weight = 1 + 5.0 * 9 / 10
    assert loss(moved, 5.0) == pytest.approx(weight / (weight + 15), rel=1e-3)


def test_a_run_goes_on_from_a_model_of_clips_on_turned_ones(recipe, tmp_path):
    first = run(recipe, out=tmp_path / "first")
    given = {"video.init": str(first), "video.turned": True, "video.plain": 0.5}
    still = run(recipe, out=tmp_path / "still", overrides={**given, "video.train.lr": 0.0})
    before, after = load(first), load(still)
    assert after.system.config.video.words == before.system.config.video.words
    assert after.clip_hashes["temporal"] == before.clip_hashes["temporal"]
    old, new = (model.system.video.animator for model in (before, after))
    assert torch.equal(old.dit.latent_in.weight, new.dit.latent_in.weight)
    run(
        recipe, out=tmp_path / "still", overrides={**given, "video.train.lr": 0.0}
    )  # finished, and not refused
    with pytest.raises(InputError, match="no model of clips"):
        run(recipe, out=tmp_path / "none", overrides={"video.init": str(tmp_path / "base")})


def test_words_that_were_hardly_learnt_are_set_apart_anew():
    system = fresh_video(picture_system(), VIDEO)
    size = float(system.denoiser.text.embedding.weight.std())
    assert float(system.video.animator.words.std()) == pytest.approx(size, rel=0.3)
    with torch.no_grad():
        system.video.animator.words[0] *= 1e-3
    went_on = continued_video(system, VIDEO).video.animator.words
    assert torch.equal(went_on[1], system.video.animator.words[1])
    assert float(went_on[0].detach().std()) == pytest.approx(size, rel=0.5)


def test_the_loss_falls(recipe, tmp_path):
    folder = run(recipe, out=tmp_path / "run", overrides={"video.train.steps": 40, "video.train.lr": 2e-3})
    rows = (folder / "video" / "log.csv").read_text().splitlines()
    place = rows[0].split(",").index("loss")
    losses = [float(row.split(",")[place]) for row in rows[1:]]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"video.mix": [1, 1, 1]}, "video.mix"),
        ({"video.frames": 8}, "frames"),
        ({"video.short": 17}, "video.short"),
        ({"video.loss.known": [0.5, 0.2, 0.2, 0.1]}, "video.loss.known"),
        ({"video.shared": 2.0}, "video.shared"),
        ({"video.plain": -0.1}, "video.plain"),
        ({"video.rows": -1}, "video.rows"),
        ({"video.mix": [0, 3, 1], "video.loss.known": [0.0, 1.0]}, "video.mix"),
        ({"video.loss.moving": -1.0}, "video.loss.moving"),
        ({"video.fast": 1}, "video.fast"),
    ],
)
def test_recipes_are_checked(recipe, changes, argument):
    with pytest.raises(InputError) as caught:
        read_recipe(recipe, changes)
    assert caught.value.argument == argument


# --- a folder of clips ---------------------------------------------------------------------------------------------


def save(clip: Clip, path: Path) -> None:
    with staged(path) as place:
        write_clip(clip, place, path.suffix[1:], {})


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "clips"
    place.mkdir()
    for k in range(4):
        save(Clip(tuple(noise(48, 40, 10 * k + t) for t in range(13)), 8.0), place / f"{k}.gif")
        (place / f"{k}.txt").write_text("a red cube rolls left")
    return place


def test_a_folder_of_clips_trains(recipe, folder, tmp_path):
    steps = {"video.codec.steps": 1, "video.train.steps": 1}
    run(recipe, data=folder, out=tmp_path / "run", overrides=steps)
    assert len(load(tmp_path / "run").generate(Request("a cube", frames=5, steps=1)).clips[0].frames) == 5


def test_clips_of_a_folder(folder):
    (folder / "short.gif").write_bytes(b"")
    save(Clip(tuple(noise(48, 40, t) for t in range(3)), 8.0), folder / "few.gif")
    (folder / "few.txt").write_text("three frames")
    for name, text in (("latin", "caf\xe9".encode("latin-1")), ("blank", b" \n")):
        save(Clip(tuple(noise(48, 40, t) for t in range(9)), 8.0), folder / f"{name}.gif")
        (folder / f"{name}.txt").write_bytes(text)
    save(Clip(tuple(noise(48, 40, t) for t in range(9)), 8.0), folder / "mute.gif")
    source = ClipFolder(folder, 32, 9)
    assert len(source) == 4 and source.pixels([0, 3]).shape == (2, 9, 32, 32, 3)
    assert source.caption(1, 5, 1) == "a red cube rolls left"
    assert len({source.digest(k) for k in range(4)}) == 4
    reasons = " ".join(str(problem) for problem in source.problems)
    assert "few.gif" in reasons and "9 are needed" in reasons and "mute.txt" in reasons
    assert "latin.txt is not UTF-8 (byte 3)" in reasons and "blank.txt is empty" in reasons


def test_a_folder_without_clips_is_refused(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no clips"):
        run(recipe, data=tmp_path / "empty", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="holds no clips"):
        ClipFolder(tmp_path, 32, 9)
    with pytest.raises(DataError, match="no folder"):
        ClipFolder(tmp_path / "none", 32, 9)
