"""Noise between two seeds: exact at its ends, as strong as noise on the way, and each picture's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.sampling import SeededNoise
from sfumato.sampling.variation import VariedNoise, slerp

SHAPE = (4, 1, 16, 16)


def varied(strength: float, seeds=(3, 3), others=(8, 9), **options) -> VariedNoise:
    return VariedNoise(seeds, others, strength, SHAPE, **options)


@pytest.mark.parametrize(
    "draw", [lambda noise: noise.initial(), lambda noise: noise(2), lambda noise: noise(2, 1)]
)
def test_the_ends_are_the_seeds_own_noise_to_the_bit(draw):
    assert torch.equal(draw(varied(0.0)), draw(SeededNoise((3, 3), SHAPE)))
    assert torch.equal(draw(varied(1.0)), draw(SeededNoise((8, 9), SHAPE)))
    middle = draw(varied(0.5))
    assert middle.shape == (2, *SHAPE) and middle.dtype == torch.float32
    assert torch.equal(middle[:1], draw(varied(0.5, (3,), (8,))))  # whatever stands beside it


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_what_lies_between_is_as_strong_as_noise(strength):
    noise = VariedNoise([1], [2], strength, (16, 1, 64, 64)).initial()
    assert abs(float(noise.std()) - 1) < 0.01 and abs(float(noise.mean())) < 0.02


@settings(deadline=None)
@given(angle=st.floats(0.01, math.pi - 0.01), t=st.floats(0, 1))
def test_it_turns_at_an_even_speed(angle, t):
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    expected = torch.tensor([[math.cos(t * angle), math.sin(t * angle)]], dtype=torch.float64)
    torch.testing.assert_close(slerp(a, b, t), expected, atol=1e-9, rtol=0)


def test_one_direction_is_mixed_straight():
    a = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    assert torch.isfinite(slerp(a, torch.zeros_like(a), 0.5)).all()
