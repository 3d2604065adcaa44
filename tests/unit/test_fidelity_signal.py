"""Measuring on arrays: exact answers where there are any, and independent ones elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft, ndimage, stats

from sfumato.fidelity import signal, targets
from sfumato.fidelity.regions.components import components
from sfumato.fidelity.validate import rank_correlation


@pytest.mark.parametrize("frequency", [1 / 64, 0.1, 0.37])
@pytest.mark.parametrize("angle", [0, 30, 90])
def test_a_grating_that_is_weaker_and_shifted_is_told_so(frequency, angle):
    before = targets.grating(48, frequency, angle, contrast=0.8).mean(-1)
    turn = np.radians(angle)
    y, x = np.mgrid[:48, :48]
    phase = 2 * np.pi * frequency * (x * np.cos(turn) + y * np.sin(turn)) - 0.7
    response = signal.grating_response(before, 0.3 + 0.4 * 0.25 * np.cos(phase), frequency, angle)
    assert abs(response) == pytest.approx(0.25, abs=1e-6)
    assert np.angle(response) == pytest.approx(-0.7, abs=1e-5)


def test_relative_error_counts_what_is_left():
    before = targets.checkerboard(32, 4).mean(-1)
    assert signal.relative_error(before, before) == 0
    assert signal.relative_error(before, np.full_like(before, before.mean())) == pytest.approx(1)
    assert signal.relative_error(before, 0.5 + 0.7 * (before - 0.5)) == pytest.approx(0.3)
    assert signal.kept(before, 0.5 + 0.7 * (before - 0.5)) == pytest.approx(0.7)


def test_the_spectrum_holds_the_variance_and_is_scipys():
    region = np.random.default_rng(0).standard_normal((3, 20, 31))
    frequency, angle, energy = signal.spectrum(region)
    assert energy.sum((1, 2)) == pytest.approx(region.var((1, 2)))
    ours = signal.dct(signal.dct(region[0], -1), -2)
    assert ours == pytest.approx(fft.dctn(region[0], norm="ortho"))
    assert (frequency[0, 0], frequency[0, 10], angle[0, 10], angle[10, 0]) == (0, 10 / 62, 0, 90)


def test_a_grating_lies_where_its_frequency_is():
    wave = signal.opponent(targets.grating(64, 0.125, 0, channel="blue-yellow", contrast=0.5))
    frequency, _, energy = signal.spectrum(wave)
    assert energy[2].sum() > 1e6 * (energy[0].sum() + energy[1].sum())
    assert (frequency * energy[2]).sum() / energy[2].sum() == pytest.approx(0.125, abs=0.005)


@pytest.mark.parametrize("channel", signal.CHANNELS)
def test_each_channel_changes_alone(channel):
    axis = signal.channel_axis(channel)
    moved = signal.opponent(axis[None, None])[:, 0, 0]
    others = np.delete(moved, signal.CHANNELS.index(channel))
    assert np.abs(others).max() < 1e-9 < np.abs(moved).max()
    assert targets.grating(32, 0.1, 0, channel=channel).min() >= -1e-9
    assert targets.grating(32, 0.1, 0, channel=channel).max() <= 1 + 1e-9


def test_an_edge_of_known_spread():
    """Blurred by a Gaussian of 2 pixels, it rises from 10 to 90 % in 2.563 deviations."""
    edge = ndimage.gaussian_filter(targets.edge(128, 5).mean(-1), 2, mode="nearest")[16:-16, 16:-16]
    position, profile = signal.edge_spread(edge, 5)
    assert signal.rise(position, profile) == pytest.approx(2.563 * 2, abs=0.3)
    assert signal.overshoot(profile) < 0.01


def test_targets_have_the_mean_of_each_pixel():
    """An edge and a line, against the same drawn 16 times finer."""
    fine = 16
    y, x = (np.mgrid[: 32 * fine, : 32 * fine] + 0.5) / fine - 0.5
    for angle in (0, 17, 45, 80):
        turn = np.radians(angle)
        across = (x - 15.5) * np.cos(turn) + (y - 15.5) * np.sin(turn)
        blocks = (across > 0).astype(float).reshape(32, fine, 32, fine).mean((1, 3))
        assert targets.edge(32, angle).mean(-1) == pytest.approx(blocks, abs=0.04)
    line = targets.line(32, 3, 0, contrast=1.0).mean(-1)
    assert (1 - line).sum(0) == pytest.approx(np.full(32, 3.0))


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
def test_targets_stand_at_different_places_of_a_cell_and_within_their_patch(factor):
    moves = targets.shifts(factor)
    assert len({move % factor for move in moves}) == min(factor, 4)
    assert sorted(move % factor for move in moves) == sorted(
        place % factor for place in targets.positions(factor)
    )
    for move in moves:
        line = 1 - targets.line(64, 2, 0, contrast=1.0, offset=(move, move)).mean(-1)[8:56, 8:56]
        assert line.sum() == pytest.approx(96)
        mask = targets.shape_mask(64, "disc", 16, (move, move))
        assert mask.sum() == pytest.approx(np.pi * 64, rel=0.02)


def test_colours_are_as_far_apart_as_the_standard_says():
    white, black, red = np.array([1.0, 1, 1]), np.zeros(3), np.array([1.0, 0, 0])
    assert signal.lab(white) == pytest.approx([100, 0, 0], abs=0.01)
    assert signal.delta_e(white, black) == pytest.approx(100, abs=0.01)
    assert signal.lab(red) == pytest.approx([53.24, 80.09, 67.20], abs=0.02)  # D65, sRGB primaries


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.integers(1, 24), st.integers(1, 24))
def test_components_are_scipys(seed, share, height, width):
    mask = np.random.default_rng(seed).random((height, width)) < share
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    found = components(mask)
    places = ndimage.find_objects(labels)
    theirs = sorted(
        (p[1].start, p[0].start, p[1].stop, p[0].stop, int((labels[p] == i + 1).sum()))
        for i, p in enumerate(places)
    )
    ours = zip(found.left, found.top, found.right, found.bottom, found.area, strict=True)
    assert sorted(tuple(int(v) for v in each) for each in ours) == theirs
    assert len(found) == count
    padded = np.pad(mask, 1)
    sides = sum(
        (mask & ~np.roll(padded, step, axis)[1:-1, 1:-1]).sum() for axis in (0, 1) for step in (1, -1)
    )
    assert found.border.sum() == sides


def test_rank_correlation_is_scipys():
    numbers = np.random.default_rng(1)
    first, second = numbers.integers(0, 9, 200), numbers.integers(0, 9, 200)
    assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second)[0])
    assert np.isnan(rank_correlation(first, np.zeros(200)))
