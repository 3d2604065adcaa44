"""Losses and measures against closed forms and independent formulas."""

import math
from dataclasses import replace

import pytest
import torch

from sfumato.autoencoder import Discriminator, DiscriminatorConfig, LossConfig, metrics
from sfumato.autoencoder.losses import (
    adaptive_weight,
    equivariance_loss,
    gradient_loss,
    haar,
    haar_loss,
    hinge_discriminator,
    hinge_generator,
    picture_loss,
    spectral_loss,
)
from sfumato.autoencoder.model import shrink_planes


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def grating(cycles: int, size: int = 64) -> torch.Tensor:
    x = torch.arange(size) * 2 * math.pi * cycles / size
    return torch.sin(x).expand(1, 3, 1, size, size)


@pytest.mark.parametrize("loss", [gradient_loss, haar_loss, spectral_loss])
def test_picture_terms_vanish_only_for_equal_pictures(loss):
    a = noise(2, 3, 2, 32, 32)
    assert loss(a, a) == 0
    assert loss(a, a + noise(2, 3, 2, 32, 32, seed=1, scale=0.1)) > 0


def test_gradient_loss_of_a_ramp_is_its_slope():
    ramp = torch.arange(16.0).mul(0.1).expand(1, 3, 1, 16, 16)
    assert gradient_loss(ramp, torch.zeros_like(ramp), scales=1) == pytest.approx(0.1, rel=1e-5)
    assert gradient_loss(ramp + 7, ramp) == pytest.approx(0, abs=1e-5)


def test_haar_is_orthonormal_and_tells_directions_apart():
    x = noise(3, 8, 8)
    assert sum(band.square().sum() for band in haar(x)) == pytest.approx(float(x.square().sum()), rel=1e-5)
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 8, 8)
    low, along_x, along_y, diagonal = (band.abs().max().item() for band in haar(stripes))
    assert (low, along_x, along_y, diagonal) == (0, 2, 0, 0)


def test_spectral_loss_ignores_where_texture_lies_and_sees_that_it_is_gone():
    wave = grating(16)
    moved = wave.roll(1, -1)
    assert spectral_loss(wave, moved) < 1e-3
    assert spectral_loss(wave, wave * 0.1) > 100 * spectral_loss(wave, moved)


def test_equivariance_loss_is_zero_for_an_exactly_equivariant_map():
    """Decoder = identity commutes with shrinking; a decoder that adds position does not."""
    pixels = noise(4, 3, 1, 16, 16)
    config = LossConfig(spectral=0.1)
    for scale in (2, 4):
        small = shrink_planes(pixels[:2], scale)
        assert equivariance_loss(small, pixels, config) == 0
        assert equivariance_loss(
            small + 0.5, pixels, replace(config, gradient=0, spectral=0)
        ) == pytest.approx(0.5)


def test_weights_multiply_terms_and_zero_leaves_them_out():
    a, b = noise(1, 3, 1, 32, 32), noise(1, 3, 1, 32, 32, seed=1)
    config = LossConfig(l1=2.0, gradient=0.5, haar=0.25, spectral=0.125)
    total, terms = picture_loss(a, b, config)
    expected = 2 * terms["l1"] + 0.5 * terms["gradient"] + 0.25 * terms["haar"] + 0.125 * terms["spectral"]
    assert total == pytest.approx(float(expected))
    total, terms = picture_loss(a, b, LossConfig(gradient=0, haar=0, spectral=0))
    assert set(terms) == {"l1"}
    assert total == pytest.approx(float((a - b).abs().mean()))


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_discriminator(real, fake) == pytest.approx(0.5 * (0.25 + 1.0))
    assert hinge_generator(fake) == pytest.approx(1.0)


def test_adaptive_weight_equals_the_hand_computed_ratio_and_is_clamped():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    picture = 0.5 * weight.square().sum()  # gradient (3, 4), norm 5
    adversarial = 2 * weight[0]  # gradient (2, 0), norm 2
    assert adaptive_weight(picture, adversarial, weight) == pytest.approx(5 / (2 + 1e-4))
    assert adaptive_weight(picture, adversarial, weight, limit=1.5) == 1.5
    assert not adaptive_weight(picture, adversarial, weight).requires_grad
    assert adaptive_weight(picture, 0 * adversarial, weight, limit=1e9) == pytest.approx(5 / 1e-4)


def test_the_discriminator_judges_patches_of_the_documented_size():
    critic = Discriminator(DiscriminatorConfig(width=8, layers=3))
    pixels = torch.zeros(1, 3, 1, 256, 256, requires_grad=True)
    logits = critic.eval()(pixels)
    assert logits.shape == (1, 1, 30, 30)
    for module in critic.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # statistics reach the whole picture; the convolutions do not
    critic(pixels)[0, 0, 15, 15].backward()
    touched = pixels.grad[0, :, 0].abs().sum(0) > 0
    assert touched.any(0).sum() == touched.any(1).sum() == 70


def test_psnr_of_known_errors():
    a = torch.zeros(3, 3, 1, 8, 8)
    b = a + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1, 1)
    values = metrics.psnr(a, b)
    assert values[:2].tolist() == pytest.approx([20.0, 40.0], abs=1e-4)
    assert math.isinf(values[2])
    assert math.isinf(metrics.psnr(a + 1, a + 1.5)[0])  # clamped


def test_ssim_of_flat_pictures_is_its_luminance_term():
    a, b = (torch.full((1, 3, 1, 16, 16), value, dtype=torch.float64) for value in (0.5, -0.2))
    c1 = (0.01 * 2) ** 2
    assert metrics.ssim(a, b).item() == pytest.approx((2 * 0.5 * -0.2 + c1) / (0.25 + 0.04 + c1), rel=1e-9)
    assert metrics.ssim(a, a).item() == pytest.approx(1)
    both = metrics.ssim(torch.cat([a, a]), torch.cat([a, b]))
    assert both.tolist() == pytest.approx([1, metrics.ssim(a, b).item()])


def test_ssim_equals_a_window_by_window_computation():
    a, b = (
        noise(1, 3, 1, 13, 12, scale=0.4).clamp(-1, 1),
        noise(1, 3, 1, 13, 12, seed=1, scale=0.4).clamp(-1, 1),
    )
    taps = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weights = torch.tensor([[x * y for x in taps] for y in taps], dtype=torch.float64)
    weights /= weights.sum()
    scores = []
    for channel in range(3):
        for y in range(3):
            for x in range(2):
                p, q = (v[0, channel, 0, y : y + 11, x : x + 11].double() for v in (a, b))
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                c1, c2 = 0.02**2, 0.06**2
                scores.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert metrics.ssim(a, b).item() == pytest.approx(float(torch.stack(scores).mean()), rel=1e-9)


def test_spectral_error_finds_the_band_that_lost_its_amplitude():
    coarse, fine = 0.4 * grating(4), 0.4 * grating(26)
    error = metrics.spectral_error(coarse + 0.1 * fine, coarse + fine, bands=4)[0]
    assert error[3].item() == pytest.approx(-1, abs=1e-3)
    assert error[0].item() == pytest.approx(0, abs=1e-3)
    assert metrics.spectral_error(coarse, coarse).abs().max() == 0
