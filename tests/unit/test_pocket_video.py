"""Pocket's clips: one frame is the picture to the bit, what is known stays, films go on, folders come back whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CPU, noise
from sfumato import load
from sfumato.cli.app import run
from sfumato.drawing.clips import as_clip
from sfumato.errors import CheckpointError, InputError
from sfumato.families.pocket import VideoConfig, fresh_video, open_folder
from sfumato.families.pocket.video import pieces
from sfumato.generate import Model
from sfumato.nn.dit import DiT, DiTConfig
from sfumato.receipts.clips import read_recipe
from sfumato.sampling.noise import SeededNoise, SharedNoise
from sfumato.storage import read_json, write_json
from sfumato.types import Clip, Conditioning, HiRes, Request
from small_video import VIDEO, picture_system, video_system, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "model")


@pytest.fixture
def model():
    return Model(video_system(), CPU, "film", torch.float32)


def test_a_fresh_denoiser_of_clips_draws_one_frame_as_the_picture_to_the_bit():
    system = fresh_video(picture_system(), VIDEO)
    cond = system.condition(["a red cube", None])
    x, time = torch.randn(2, 4, 1, 4, 4), torch.tensor(0.6)
    one = system.denoiser.dit(x, time, cond)
    assert torch.equal(system.video.animator.dit(x, time, cond), one)
    each = system.video.animator.dit(x, torch.full((2, 1), 0.6), cond)
    torch.testing.assert_close(each, one, rtol=1e-4, atol=1e-4)


def test_a_level_for_each_frame_equals_one_for_all_and_tells_frames_apart():
    torch.manual_seed(0)
    dit = DiT(DiTConfig(latent_channels=2, patch=2, width=32, depth=2, heads=1, text_width=16)).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, cond = (
        torch.randn(2, 2, 3, 4, 4),
        Conditioning(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)),
    )
    with torch.no_grad():
        same = dit(x, torch.full((2, 3), 0.4), cond)
        torch.testing.assert_close(same, dit(x, torch.full((2,), 0.4), cond), rtol=1e-4, atol=1e-4)
        other = dit(x, torch.tensor([[0.0, 0.4, 0.4]]).expand(2, 3), cond)
    assert (other - same).abs().max() > 1e-3


def test_some_tokens_of_a_clip_are_answered_as_they_are_among_all_and_the_rest_with_zero():
    torch.manual_seed(0)
    dit = DiT(DiTConfig(latent_channels=2, patch=2, width=32, depth=2, heads=1, text_width=16)).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 2, 3, 4, 4)
    cond = Conditioning(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    time = torch.tensor([[0.0, 0.4, 0.4], [0.2, 0.5, 0.9]])
    every = torch.stack([torch.randperm(12), torch.randperm(12)])  # each clip's in an order of its own
    with torch.no_grad():
        for level in (time, torch.tensor([0.3, 0.6])):
            whole = dit(x, level, cond)
            torch.testing.assert_close(dit(x, level, cond, seen=every), whole, rtol=1e-4, atol=1e-4)
        some = dit(x, time, cond, seen=torch.tensor([[0, 5, 8], [1, 5, 11]]))
        other = x.clone()
        other[0, :, 0, 0, 2] += 1  # token 1, which the first clip does not see, and the second does
        other[1, :, 0, 0, 0] += 1  # token 0, the other way round
        torch.testing.assert_close(dit(other, time, cond, seen=torch.tensor([[0, 5, 8], [1, 5, 11]])), some)
    answered = some.abs().amax(1).unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)).flatten(1) > 0
    assert [row.nonzero()[:, 0].tolist() for row in answered] == [[0, 5, 8], [1, 5, 11]]


def test_what_a_word_is_is_told_beside_what_the_text_encoder_makes_of_it():
    system = video_system()
    animator, text = system.video.animator, system.denoiser.text
    ids, mask = system.clip_tokenizer.batch(["a red cube rolls left"])
    features = text(ids, mask, animator.words)
    with torch.no_grad():
        animator.named.zero_()
        assert torch.equal(animator.read(text, ids, mask).tokens, features)
        left = int(ids[0, mask[0]][-1])
        animator.named[left] = 1 / features.shape[-1] ** 0.5
        told = animator.read(text, ids, mask).tokens - features
    torch.testing.assert_close(told, (ids == left)[..., None].float().expand_as(told))


def test_a_single_frame_is_the_picture_in_the_autoencoder_too():
    system, bare = video_system(), picture_system()
    pixels = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    bare = replace(bare, autoencoder=system.autoencoder)
    assert torch.equal(system.encode(pixels), bare.encode(pixels))
    assert torch.equal(system.decode(system.encode(pixels)), bare.decode(bare.encode(pixels)))


def test_a_clip_through_the_autoencoder_begins_with_its_first_frame_and_has_its_length():
    system = video_system()
    pixels = torch.rand(1, 3, 25, 16, 16) * 2 - 1
    latent = system.encode(pixels)
    assert latent.shape == (1, 4, 7, 2, 2) == (1, *system.latent_shape(25, 16, 16))
    back = system.decode(latent)
    assert back.shape == pixels.shape
    torch.testing.assert_close(back[:, :, :1], system.decode(system.encode(pixels[:, :, :1])))


@pytest.mark.parametrize(("count", "size"), [(1, 4), (5, 4), (17, 16), (33, 16), (7, 3)])
def test_pieces_cover_a_clip_once(count, size):
    assert [k for start, stop in pieces(count, size) for k in range(start, stop)] == list(range(count))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler", "heun", "euler_a"])
def test_a_first_picture_is_the_first_frame_whatever_draws(model, sampler):
    picture = noise(32, 32)
    request = Request("a red cube", frames=9, image=picture, sampler=sampler, steps=3)
    drawn = model.generate(request).clips[0]
    kept = model.decode(model.encode(picture))[0]
    assert np.abs(np.asarray(drawn.frames[0]).astype(int) - np.asarray(kept)).max() <= 1
    assert np.abs(np.asarray(drawn.frames[-1]).astype(int) - np.asarray(kept)).max() > 3


def test_a_film_longer_than_training_goes_on_from_its_last_latents(model):
    steps = []
    long = model.generate(
        Request("a red cube", frames=25, steps=2, seed=4), lambda s: steps.append((s.index, s.total))
    )
    assert len(long.clips[0].frames) == 25
    assert steps == [(k, 6) for k in range(6)]  # 7 latents in stretches of 3, 2 of them new
    short = model.generate(Request("a red cube", frames=9, steps=2, seed=4)).clips[0]
    again = model.generate(Request("a red cube", frames=25, steps=2, seed=4)).clips[0]
    assert all(np.array_equal(a, b) for a, b in zip(long.clips[0].frames, again.frames, strict=True))
    assert len(short.frames) == 9


def test_clip_k_is_the_clip_of_its_seed(model):
    two = model.generate(Request("a red cube", frames=5, steps=2, seed=1, count=2)).clips
    one = model.generate(Request("a red cube", frames=5, steps=2, seed=2)).clips[0]
    assert all(np.array_equal(a, b) for a, b in zip(two[1].frames, one.frames, strict=True))


def test_strength_nothing_gives_the_clip_back_through_the_autoencoder(model):
    clip = Clip(tuple(noise(32, 32, k) for k in range(5)), 8.0)
    same = model.generate(Request("a red cube", clip=clip, strength=0.0)).clips[0]
    assert len(same.frames) == 5
    first = model.decode(model.encode(clip.frames[0]))[0]
    assert np.abs(np.asarray(same.frames[0]).astype(int) - np.asarray(first)).max() <= 1


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"frames": 8}, "frames"),
        ({"frames": 9, "reuse": 2}, "reuse"),
        ({"frames": 9, "hires": HiRes(2)}, "hires"),
        ({"frames": 9, "guidance_first": 1.0}, None),
    ],
)
def test_what_it_cannot_draw_is_named(model, changes, argument):
    with pytest.raises(InputError) as caught:
        model.generate(Request("a red cube", **changes))
    assert argument is None or caught.value.argument == argument


def test_a_clip_to_begin_with_says_how_long_a_clip_is(model):
    frames = [Image.new("RGB", (32, 32))] * 9
    assert as_clip(model, Request(clip=Clip(frames, 8.0))).moves
    with pytest.raises(InputError, match="2 or more"):
        as_clip(model, Request(clip=Clip(frames[:1], 8.0)))


def test_pictures_are_drawn_as_before_and_say_nothing_of_clips(model):
    plain = Model(picture_system(), CPU, "film", torch.float32)
    for name in ("autoencoder", "denoiser"):
        getattr(plain.system, name).load_state_dict(getattr(model.system, name).state_dict())
        getattr(plain.system, name).eval()
    ours, theirs = (m.generate(Request("a red cube", seed=3)) for m in (model, plain))
    assert np.array_equal(ours.images[0], theirs.images[0])
    assert ours.recipe["weights"] == theirs.recipe["weights"]
    moving = model.generate(Request("a red cube", frames=5, steps=1))
    assert set(moving.recipe["weights"]) == {"autoencoder", "denoiser", "temporal", "animator"}


def test_a_folder_comes_back_whole(folder):
    saved, opened = video_system(), open_folder(folder, CPU)
    assert opened.config == saved.config
    for name in ("temporal", "animator"):
        ours, theirs = (getattr(s.video, name).state_dict() for s in (saved, opened))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key].bfloat16().float(), theirs[key]) for key in ours)


def test_a_folder_without_its_parts_for_clips_is_refused(folder, tmp_path):
    card = read_json(folder / "model.json")
    del card["files"]["temporal"]
    (tmp_path / "m").mkdir()
    write_json(tmp_path / "m" / "model.json", card)
    with pytest.raises(CheckpointError, match="temporal"):
        open_folder(tmp_path / "m", CPU)


@pytest.mark.parametrize("wrong", [{"frames": 8}, {"context": 3}, {"fps": 0}, {"shared": 2}, {"window": 0}])
def test_shapes_are_checked(wrong):
    with pytest.raises(InputError):
        VideoConfig(**{"window": 3, "context": 1, **wrong})


def test_frames_share_noise_and_it_stays_standard():
    own = SeededNoise([0, 1], (4, 5, 32, 32))
    found = SharedNoise(own, 0.6).initial()
    assert abs(float(found.std()) - 1) < 0.03
    a, b = found[:, :, 0].flatten(), found[:, :, 3].flatten()
    assert abs(float((a * b).mean()) - 0.6) < 0.05
    assert torch.equal(SharedNoise(SeededNoise([1], (4, 5, 32, 32)), 0.6).initial()[0], found[1])


def test_the_command_line_draws_a_clip_and_goes_on_by_its_recipe(folder, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    pytest.importorskip("av")
    given = ["-m", str(folder), "-o", str(out), "--frames", "13", "--steps", "2"]
    assert run(["animate", "a red cube rolls", *given]) == 0
    said = read_recipe(out)["request"]
    assert (said["frames"], said["fps"], said["prompt"]) == (13, 8.0, "a red cube rolls")
    first = noise(40, 32)
    first.save(tmp_path / "first.png")
    image = ["--image", str(tmp_path / "first.png")]
    again = tmp_path / "again.gif"
    assert (
        run(["animate", "-m", str(folder), "--like", str(out), "-o", str(again), "--seed", "5", *image]) == 0
    )
    assert read_recipe(again)["request"]["seed"] == 5
    assert run(["animate", "x", "-m", str(folder), "-o", str(tmp_path / "no.mp4"), "--frames", "12"]) == 2
    assert "13" in capsys.readouterr().err


def test_a_model_of_pictures_alone_says_so(tmp_path, capsys):
    from helpers import tiny_folder

    place = tiny_folder(tmp_path / "plain")
    assert run(["animate", "a cube", "-m", str(place), "-o", str(tmp_path / "x.gif")]) == 2
    assert "draws pictures" in capsys.readouterr().err
    assert load(place).clip_preset == {}
