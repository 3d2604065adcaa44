"""Scenes as a source: fixed by their seed, rendered once, described anew."""

import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from sfumato.data import scenes as module
from sfumato.data.scenes import SceneSource
from sfumato.data.source import Source
from sfumato.errors import Cancelled, InputError, SfumatoError
from sfumato.scenes import holds, scene_hash, split_of

SIZE = 16


@pytest.fixture(scope="module")
def plain():
    """24 scenes without a cache, with their pixels and masks."""
    source = SceneSource(24, 5, "train", SIZE)
    return source, source.pixels(range(24)), source.instances(range(24))


def test_scenes_are_fixed_by_seed_and_number(plain):
    source, pixels, _ = plain
    assert isinstance(source, Source) and len(source) == 24
    assert source.buckets() == {(SIZE, SIZE): list(range(24))}
    assert pixels.shape == (24, SIZE, SIZE, 3) and pixels.dtype == np.uint8
    longer = SceneSource(30, 5, "train", SIZE)
    hashes = [scene_hash(longer.scene(i)) for i in range(30)]
    assert hashes[:24] == [scene_hash(source.scene(i)) for i in range(24)] and len(set(hashes)) == 30
    assert [longer.digest(i) for i in range(24)] == [source.digest(i) for i in range(24)]
    assert scene_hash(SceneSource(1, 6, "train", SIZE).scene(0)) not in hashes
    assert all(split_of(source.scene(i)) == "train" for i in range(24))


def test_digests_know_what_decides_the_pixels():
    variants = [
        {},
        {"seed": 1},
        {"size": 32},
        {"split": "counts"},
        {"frames": 2},
        {"options": {"objects": [1, 1]}},
    ]
    made = [SceneSource(2, **{"seed": 0, "size": SIZE, **v}).digest(i) for v in variants for i in range(2)]
    assert len(set(made)) == 12
    assert SceneSource(2, size=SIZE, style="short").digest(0) == SceneSource(9, size=SIZE).digest(0)


def test_captions_are_true_and_change_with_the_epoch(plain):
    source = plain[0]
    for index in range(24):
        told = [source.described(index, epoch) for epoch in range(6)]
        assert told == [source.described(index, epoch) for epoch in range(6)]
        assert source.caption(index, 3) == told[3][0]
        assert all(holds(statement, source.scene(index)) for _, statement in told)
        assert len({text for text, _ in told}) > 1


def test_labels_agree_with_the_masks(plain):
    source, _, instances = plain
    labels = source.labels(range(24), 8)
    assert labels.shape == (24, 4, SIZE // 8, SIZE // 8) and labels.dtype == torch.int64
    empty = torch.from_numpy(instances.reshape(24, 2, 8, 2, 8).transpose(0, 1, 3, 2, 4).max((3, 4)) == 0)
    assert empty.any() and (labels > 0).any()
    assert (labels.permute(0, 2, 3, 1)[empty] == 0).all()


def test_cached_rows_are_the_rendered_ones(plain, tmp_path):
    _, pixels, instances = plain
    steps = []
    source = SceneSource(24, 5, "train", SIZE, cache=tmp_path, chunk=10).prepare(
        1, lambda *p: steps.append(p)
    )
    assert steps == [(10, 24), (20, 24), (24, 24)]
    again = SceneSource(24, 5, "train", SIZE, cache=tmp_path, chunk=10)
    assert again.store is not None and again.store.missing() == []
    picked = [23, 0, 11, 0]
    for made in (source, again):
        assert np.abs(made.pixels(picked).astype(int) - pixels[picked]).max() <= 1
        assert np.array_equal(made.instances(picked), instances[picked])
        assert torch.equal(made.labels(picked, 8), plain[0].labels(picked, 8))


def test_several_processes_render_the_same(plain, tmp_path):
    one = SceneSource(24, 5, "train", SIZE, cache=tmp_path / "one", chunk=8).prepare(1)
    two = SceneSource(24, 5, "train", SIZE, cache=tmp_path / "two", chunk=8).prepare(2)
    for field in ("rgb", "instances"):
        assert np.array_equal(one.store.rows(field, range(24)), two.store.rows(field, range(24)))


def test_processes_import_nothing_from_the_working_folder(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("json", "sfumato", "torch"):
        (here / f"{name}.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.path", ["", str(here), *sys.path])
    source = SceneSource(4, 5, "train", SIZE, cache=tmp_path / "cache", chunk=2).prepare(2)
    assert source.store.missing() == []


def test_a_stopped_preparation_goes_on_where_it_was(plain, tmp_path, monkeypatch):
    rendered = []
    original = SceneSource.render_chunk
    monkeypatch.setattr(SceneSource, "render_chunk", lambda s, c: rendered.append(c) or original(s, c))

    def stop(done, total):
        if done >= 16:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        SceneSource(24, 5, "train", SIZE, cache=tmp_path, chunk=8).prepare(1, stop)
    assert rendered == [0, 1]
    source = SceneSource(24, 5, "train", SIZE, cache=tmp_path, chunk=8)
    assert source.store.missing() == [2]
    assert np.abs(source.pixels([20]).astype(int) - plain[1][[20]]).max() <= 1  # made when it is asked for
    assert rendered == [0, 1, 2]
    source.prepare(1)
    assert rendered == [0, 1, 2]


def test_an_interruption_leaves_no_thread_that_counts(tmp_path):
    source = SceneSource(24, 5, "train", SIZE, cache=tmp_path, chunk=4)
    others, counted = set(threading.enumerate()), []

    def interrupt(done, total):
        if not counted:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.5)  # long enough for the caller's thread to be gone if it did not wait
        counted.append(done)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            source.prepare(2, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= others
    assert counted and len(source.store.missing()) == 6 - len(counted)
    source.prepare(2)
    assert source.store.missing() == []


def test_a_failing_process_is_reported(tmp_path, monkeypatch):
    source = SceneSource(24, 5, "train", SIZE, cache=tmp_path, chunk=8)
    monkeypatch.setattr(source, "_arguments", lambda: {"count": 0, "cache": str(tmp_path)})
    with pytest.raises(
        SfumatoError, match=r"rendering process ended with status 1: .*count must be at least 1"
    ):
        source.prepare(2)
    assert source.store.missing() == [0, 1, 2]


def test_another_renderer_is_another_cache(tmp_path, monkeypatch):
    first = SceneSource(4, 5, "train", SIZE, cache=tmp_path)
    monkeypatch.setattr(module, "RENDERER", module.RENDERER + 1)
    second = SceneSource(4, 5, "train", SIZE, cache=tmp_path)
    assert first.store.directory != second.store.directory and first.digest(0) != "" != second.digest(0)
    assert len(list(tmp_path.glob("scenes-*"))) == 2


def test_moving_scenes_have_frames():
    source = SceneSource(2, 5, "train", SIZE, frames=3)
    assert source.pixels([0, 1]).shape == (2, 3, SIZE, SIZE, 3)
    assert source.instances([0, 1]).shape == (2, 3, SIZE, SIZE)
    assert source.labels([0, 1], 8) is None


def test_bad_arguments():
    for name, value in (("count", 0), ("size", 0), ("frames", 0), ("chunk", 0)):
        with pytest.raises(InputError, match=f"{name} must be at least 1") as error:
            SceneSource(**{"count": 4, name: value})
        assert error.value.argument == name
    source = SceneSource(4, size=SIZE)
    for index in (-1, 4):
        with pytest.raises(InputError, match="there is no scene"):
            source.pixels([index])
    with pytest.raises(InputError, match="split 'tset' is unknown"):
        SceneSource(4, split="tset", size=SIZE).caption(0)
