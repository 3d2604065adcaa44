"""Clips as a worker has them: what is asked, what it takes, and the files that stand for clips in requests."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import small_svd
from helpers import tiny_system
from sfumato.errors import DataError, InputError
from sfumato.families.svd.system import open_system
from sfumato.generate import Model
from sfumato.receipts.clips import encoded
from sfumato.receipts.work import work_of
from sfumato.serve.asked import files_of, request_of
from sfumato.serve.worker.costs import Costs
from sfumato.serve.worker.loras import Sent
from sfumato.serve.worker.models import Opened, _shared, shortest, usual
from sfumato.serve.worker.together import Bench, Together
from sfumato.types import Clip, Request
from sfumato.video.read import decode_clip
from small_video import video_system

CPU = torch.device("cpu")
FRAMES = 3


@pytest.fixture(scope="module")
def moves(tmp_path_factory):
    place = small_svd.write("svd", tmp_path_factory.mktemp("svd") / "model", frames=FRAMES)
    return Model(open_system(place, CPU, torch.float32, systems=small_svd.SMALL), CPU, "moves")


@pytest.fixture(scope="module")
def costs(moves):
    return Costs(moves)


def opened(model: Model) -> Opened:
    return Opened("it", model, model, Sent(model.system.adapters))


def test_a_clip_is_asked_for_where_clips_are_drawn(moves):
    first = small_svd.picture()
    asked = opened(moves).asked(Request(image=first), "clip")
    assert asked.frames == FRAMES and asked.fps == 7 and asked.moves
    assert opened(moves).asked(Request(image=first, frames=2), "clip").frames == 2
    for request, kind, argument in (
        (Request(image=first, frames=1), "clip", "frames"),
        (Request(), "clip", "image"),
        (Request(image=first, frames=2), "picture", "frames"),
    ):
        with pytest.raises(InputError) as refused:
            opened(moves).asked(request, kind)
        assert refused.value.argument == argument
    facts = opened(moves).facts()
    assert facts["clips"] and facts["needs_image"] and facts["preset"]["frames"] == FRAMES


def test_a_model_of_pictures_draws_no_clips():
    with pytest.raises(InputError) as refused:
        opened(Model(tiny_system(), CPU, "tiny")).asked(Request("a"), "clip")
    assert refused.value.argument == "model"


@pytest.mark.parametrize("kind", ["svd", "pocket"])
def test_clips_are_decoded_by_the_device_s_thread_on_the_account_of_who_asks(moves, kind):
    model = moves if kind == "svd" else Model(video_system(), CPU, "film")
    bench, seen = Bench(CPU), set()
    shared = _shared(model, "it", Together(bench, 16), None)
    latent = torch.randn(1, *model.latent_shape(64, 64, 9 if kind == "pocket" else FRAMES))
    watch = register_module_forward_pre_hook(lambda *_: seen.add(threading.current_thread().name))
    try:
        pieces = list(shared.decode_pieces(latent))
    finally:
        watch.remove()
        spent = bench.spent()
        bench.close()
    assert seen == {"device"} and spent.other > 0
    assert torch.equal(torch.cat(pieces, 2), torch.cat(list(model.decode_pieces(latent)), 2))


@pytest.mark.full  # traces the network
def test_what_a_clip_takes_grows_with_its_frames(moves, costs):
    first, size = small_svd.picture(), (256, 192)
    assert shortest(moves).frames == 2 and usual(moves).frames == FRAMES
    two, three = (
        costs.expected(moves.complete(Request(image=first, frames=frames, size=size, steps=4, count=2)))
        for frames in (2, 3)
    )
    pixels = size[0] * size[1]
    assert (two.pixel_steps, three.pixel_steps) == (2 * 2 * 4 * pixels, 2 * 3 * 4 * pixels)
    assert three.steps == 8 and three.frames == 3  # one clip after the other
    assert three.need > two.need > 0 and three.seconds > two.seconds
    assert three.flops["denoise"] > two.flops["denoise"] > 0 and "encode" not in two.flops
    told = three.to_json()
    assert (told["pictures"], told["frames"], told["fps"]) == (2, 3, 7)
    costs.memory = two.need
    with pytest.raises(InputError, match="memory"):
        costs.expected(moves.complete(Request(image=first, frames=3, size=size, count=2)))


@pytest.mark.full  # traces the network
def test_a_film_that_the_disk_has_no_room_for_is_refused(moves, costs, monkeypatch):
    request = moves.complete(Request(image=small_svd.picture(), frames=3, size=(64, 64), count=2))
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=6 * 3 * 64 * 64 - 1))
    costs.expected(request)  # frames that few wait in memory
    monkeypatch.setattr("sfumato.video.frames.IN_MEMORY", 0)
    with pytest.raises(InputError, match=r"6 frames of 64x64 need .* of the server's disk") as refused:
        costs.expected(request)
    assert refused.value.argument == "frames"
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=6 * 3 * 64 * 64))
    costs.expected(request)


@pytest.mark.full  # traces the network
def test_flops_of_clips_of_other_lengths_are_not_taken_for_each_other(costs):
    first = small_svd.picture()
    works = [
        work_of(costs.plain, Request(image=first, frames=frames, size=(256, 192), steps=2, count=3))
        for frames in (2, 3)
    ]
    totals = [sum(part.total for part in work if part.stage == "denoise") for work in works]
    assert totals[0] < totals[1]
    assert [part.pictures for part in works[0] if part.stage == "decode"] == [1]


def test_a_clip_in_a_request_is_an_uploaded_file():
    clip = Clip(tuple(small_svd.picture(seed=k) for k in range(4)), 5.0)
    name, data = "file_" + "0" * 32, encoded(clip, {"request": {}}, "webp")
    values = {"clip": name, "frames": 3, "strength": 0.5}
    assert files_of(values) == {name: "clip"}
    found = request_of(values, {name: data}).clip
    assert len(found.frames) == 3 and found.fps == pytest.approx(5)
    assert (np.asarray(found.frames[2]) == np.asarray(clip.frames[2])).all()
    for wrong in (b"", b"no clip", data[:100]):
        with pytest.raises(InputError) as refused:
            request_of(values, {name: wrong})
        assert refused.value.argument == "clip"
    with pytest.raises(InputError, match="uploaded"):
        files_of({"clip": {"frames": [], "fps": 3}})
    with pytest.raises(DataError, match="pixels"):
        decode_clip(data, most=2 * 64 * 48)
