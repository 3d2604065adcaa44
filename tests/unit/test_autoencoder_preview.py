"""The linear look at a latent: published factors, and a fit that is the best of its kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.autoencoder.preview import PUBLISHED, colours, factors_of, fit_factors, preview
from sfumato.errors import InputError


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_preview_is_linear_clamped_and_one_pixel_per_cell():
    factors = noise(5, 3)
    latent = noise(2, 4, 3, 5, 6) * 0.1
    pixels = colours(factors * 0.3, latent)
    assert pixels.shape == (2, 3, 3, 5, 6)
    cell = latent[1, :, 2, 3, 4] @ factors[:4] * 0.3 + factors[4] * 0.3
    torch.testing.assert_close(pixels[1, :, 2, 3, 4], cell.clamp(-1, 1))
    assert colours(factors, latent * 1000).abs().max() == 1
    with pytest.raises(InputError, match="factors"):
        colours(factors[:4], latent)


def test_published_factors_belong_to_their_latent_spaces():
    for (channels, scale), rows in PUBLISHED.items():
        config = KLConfig(latent_channels=channels, scaling_factor=scale)
        assert factors_of(config).shape == (channels + 1, 3) == (len(rows), 3)
    own = tuple((float(i), 0.0, 1.0) for i in range(5))
    assert factors_of(KLConfig(preview=own))[3, 0] == 3
    latent = noise(1, 4, 1, 2, 2)
    assert torch.equal(preview(KLConfig(), latent), colours(torch.tensor(PUBLISHED[4, 0.18215]), latent))
    with pytest.raises(InputError, match="fit_factors"):
        preview(KLConfig(scaling_factor=0.3), latent)


def test_a_fit_finds_the_factors_of_a_linear_decoder():
    truth = noise(5, 3) * 0.1
    latent = noise(2, 4, 2, 8, 8)
    pixels = colours(truth, latent).repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert pixels.abs().max() < 1
    ripple = torch.tensor([[0.05, -0.05], [-0.05, 0.05]]).repeat(16, 16)  # averages out over a cell
    torch.testing.assert_close(fit_factors(latent, pixels + ripple), truth, atol=1e-6, rtol=1e-5)


def test_a_fit_to_a_model_s_own_decode_is_the_best_linear_one():
    torch.manual_seed(0)
    kl = AutoencoderKL(KLConfig(widths=(8, 16, 16), groups=4, resnets=1)).eval().requires_grad_(False)
    latent = noise(2, 4, 1, 9, 8)
    pixels = kl.decode_normalized(latent)
    small = F.avg_pool3d(pixels.clamp(-1, 1), (1, 4, 4))
    factors = fit_factors(latent, pixels)

    def distance(rows: torch.Tensor) -> float:
        pixels = latent.movedim(1, -1) @ rows[:-1] + rows[-1]
        return float((pixels.movedim(-1, 1) - small).square().mean())

    best = distance(factors)
    assert best < small.var()
    for seed in range(5):
        assert distance(factors + 0.02 * noise(5, 3, seed=seed)) > best
    with pytest.raises(InputError, match="cells"):
        fit_factors(latent[:1, :, :, :2, :2], pixels[:1, :, :, :8, :8])
    with pytest.raises(InputError, match="pixels"):
        fit_factors(latent, pixels[..., :-1])
