"""Buckets and the order of batches: shapes, fairness, random access, sharding."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfumato.data.buckets import Order, bucket_sizes, fit, nearest_bucket, raw_bits, shuffled
from sfumato.errors import InputError


def three_buckets(counts=(37, 5, 100)):
    sizes = [(64, 64), (48, 80), (80, 48)]
    start = np.cumsum([0, *counts])
    return {s: list(range(start[i], start[i + 1])) for i, s in enumerate(sizes)}


@given(st.integers(1, 40), st.integers(1, 64), st.floats(1.0, 4.0))
def test_bucket_sizes_hold_what_they_promise(cells, multiple, ratio):
    size = cells * multiple
    sizes = bucket_sizes(size, multiple, ratio)
    assert (size, size) in sizes and sizes == sorted(set(sizes))
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert max(height / width, width / height) <= ratio
        assert abs(height * width / size**2 - 1) <= 0.1
        assert (width, height) in sizes


def test_known_bucket_sizes():
    assert bucket_sizes(64, 16) == [(48, 80), (64, 64), (80, 48)]
    assert bucket_sizes(128, 16, 1.0) == [(128, 128)]
    assert {(768, 1344), (832, 1280), (896, 1152)} <= set(bucket_sizes(1024, 64))


@pytest.mark.parametrize(("size", "multiple", "nearest"), [(100, 16, 96), (8, 16, 16), (0, 8, 8), (-8, 8, 8)])
def test_a_size_that_does_not_divide_names_the_nearest(size, multiple, nearest):
    with pytest.raises(InputError, match=f"the nearest is {nearest}") as error:
        bucket_sizes(size, multiple)
    assert error.value.argument == "size"


def test_nearest_is_by_ratio_either_way():
    sizes = bucket_sizes(64, 16)
    assert nearest_bucket(100, 100, sizes) == (64, 64)
    assert nearest_bucket(100, 170, sizes) == (48, 80)
    assert nearest_bucket(999, 1, sizes) == (80, 48)


def test_fit_keeps_the_middle_and_never_distorts():
    array = np.zeros((40, 100, 3), np.uint8)
    array[:, 30:70] = 255
    assert (np.asarray(fit(Image.fromarray(array), (40, 40))) == 255).all()
    assert (np.asarray(fit(Image.fromarray(array), (40, 40), (0.5, 0.0)))[:, :30] == 0).all()
    circle = np.hypot(*np.mgrid[-50:50, -100:100]) < 40
    small = np.asarray(fit(Image.fromarray((circle[..., None] * np.full(3, 255)).astype(np.uint8)), (50, 50)))
    inside = np.argwhere(small[..., 0] > 127)
    assert np.abs(np.ptp(inside, axis=0) - 39).max() <= 1  # still as tall as wide


def test_fit_averages_when_it_shrinks():
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = np.asarray(fit(Image.fromarray(np.stack([checks] * 3, -1)), (16, 16)))
    assert np.abs(small.astype(int) - 127.5).max() < 4


def test_fit_at_the_same_size_changes_nothing():
    array = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    assert np.array_equal(fit(Image.fromarray(array), (24, 40)), array)


def test_random_bits_are_fixed_forever():
    """Orders that runs were started with must survive updates; these values were computed once and kept."""
    assert raw_bits(2, "a", 1).tolist() == [18164950112855504215, 14275459605996888248]
    assert shuffled(8, "pass", 0).tolist() == [2, 1, 0, 6, 7, 5, 4, 3]


@pytest.mark.parametrize("batch", [1, 4, 7, 64, 200])
def test_every_batch_is_full_and_of_one_bucket(batch):
    buckets = three_buckets()
    where = {i: size for size, members in buckets.items() for i in members}
    order = Order(buckets, batch, seed=3)
    for step in range(60):
        drawn = order.batch_at(step)
        assert len(drawn.indices) == len(drawn.epochs) == batch
        assert {where[i] for i in drawn.indices.tolist()} == {order.bucket_at(step)}


@pytest.mark.parametrize("batch", [1, 4, 7, 64, 200])
def test_no_picture_is_dropped_or_favoured(batch):
    buckets = three_buckets()
    order = Order(buckets, batch, seed=3)
    epochs = 9
    seen = Counter()
    for step in range(order.steps_before(epochs)):
        seen.update(order.batch_at(step).indices.tolist())
    for members in buckets.values():
        counts = [seen[i] for i in members]
        assert max(counts) - min(counts) <= 1
        assert epochs - batch / len(members) - 1 <= min(counts) and max(counts) <= epochs
    longest = order.steps_before(batch)  # after `batch` epochs every bucket has come out even
    seen = Counter(i for step in range(longest) for i in order.batch_at(step).indices.tolist())
    assert set(seen.values()) == {batch} and len(seen) == 142


def test_epochs_count_the_passes_of_each_picture():
    order = Order(three_buckets(), 8, seed=1)
    seen = Counter()
    for step in range(order.steps_before(8)):
        drawn = order.batch_at(step)
        for index, epoch in sorted(
            zip(drawn.indices.tolist(), drawn.epochs.tolist(), strict=True), key=lambda p: p[1]
        ):
            seen[index, epoch] += 1
    assert set(seen.values()) == {1}
    assert {epoch for _, epoch in seen} == set(range(8))


@given(st.integers(0, 10**9), st.integers(1, 50), st.integers(0, 2**40))
def test_any_step_can_be_asked_first(step, batch, seed):
    far = Order(three_buckets(), batch, seed)
    near = Order(three_buckets(), batch, seed)
    near.batch_at(0)
    near.batch_at(step + 1)
    assert np.array_equal(far.batch_at(step).indices, near.batch_at(step).indices)
    epoch = far.epoch_at(step)
    assert far.steps_before(epoch) <= step < far.steps_before(epoch + 1)


def test_seeds_and_epochs_are_shuffled_differently():
    buckets = {(64, 64): list(range(1000))}
    first = [Order(buckets, 1000, seed).batch_at(0).indices.tolist() for seed in range(4)]
    again = [Order(buckets, 1000, 0).batch_at(step).indices.tolist() for step in range(4)]
    assert len({tuple(p) for p in first + again}) == 7  # seed 0, step 0 is in both
    places = np.argsort(np.array(first + again[1:]), axis=1)
    assert abs(np.corrcoef(places)[np.triu_indices(7, 1)]).max() < 0.15


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_share_the_global_batch(world):
    order = Order(three_buckets(), 12, seed=5)
    for step in (0, 7, 40):
        whole = order.batch_at(step)
        parts = [order.batch_at(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate([p.indices for p in parts]), whole.indices)
        assert np.array_equal(np.concatenate([p.epochs for p in parts]), whole.epochs)


def test_bad_arguments():
    order = Order(three_buckets(), 12)
    for rank, world in ((0, 5), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match="cannot be split"):
            order.batch_at(0, rank, world)
    with pytest.raises(InputError, match="step must not be negative"):
        order.batch_at(-1)
    with pytest.raises(InputError, match="batch must be at least 1"):
        Order(three_buckets(), 0)
    with pytest.raises(InputError, match="no picture"):
        Order({(64, 64): []}, 4)
