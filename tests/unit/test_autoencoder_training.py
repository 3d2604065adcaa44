"""The training step: it learns, repeats to the bit, and keeps the two players' gradients apart."""

from dataclasses import replace

import pytest
import torch

from sfumato.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Discriminator,
    DiscriminatorConfig,
    LossConfig,
    metrics,
)
from sfumato.errors import InputError
from sfumato.train.autoencoder import (
    autoencoder_loss,
    discriminator_loss,
    draw_shrink,
    latent_statistics,
    unwrapped,
)

CONFIG = AutoencoderConfig(
    factor=8, latent_channels=8, encoder_width=32, decoder_width=32, max_width=64, decoder_blocks=1
)


def fresh(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(CONFIG)


def shapes(size: int = 32) -> torch.Tensor:
    """Two pictures: a disc on a ramp and crossing bars, (2, 3, 1, size, size) in [-1, 1]."""
    axis = torch.linspace(-1, 1, size)
    y, x = axis[:, None].expand(size, size), axis.expand(size, size)
    disc = torch.where(x**2 + y**2 < 0.3, torch.tensor(0.9), 0.5 * x)
    bars = torch.where((x.abs() < 0.2) | (y.abs() < 0.2), torch.tensor(-0.8), torch.tensor(0.3))
    return torch.stack([torch.stack([disc, -disc, x * 0.5]), torch.stack([bars, y * 0.7, bars])])[:, :, None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_tiny_model_overfits_two_pictures():
    model, pixels = fresh(), shapes()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    config = LossConfig(equivariance=0)
    draw = generator()
    with torch.no_grad():
        before = metrics.psnr(model(pixels).pixels, pixels).min()
    for step in range(1, 121):
        loss, _ = autoencoder_loss(model, pixels, config, draw, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = metrics.psnr(model(pixels).pixels, pixels).min()
    assert after > max(before + 8, 20)


def test_a_step_depends_on_weights_pixels_generator_and_step_alone():
    config = LossConfig()
    results = []
    for _ in range(2):
        model = fresh()
        loss, logs = autoencoder_loss(model, shapes(), config, generator(5), 1)
        loss.backward()
        results.append((loss, logs, [p.grad for p in model.parameters()]))
        torch.rand(3)  # the global generator plays no part
    (a, logs_a, grads_a), (b, logs_b, grads_b) = results
    assert torch.equal(a, b)
    assert all(torch.equal(logs_a[name], logs_b[name]) for name in logs_a)
    assert all(torch.equal(x, y) for x, y in zip(grads_a, grads_b, strict=True))
    other, _ = autoencoder_loss(fresh(), shapes(), config, generator(6), 1)
    assert not torch.equal(a, other)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    config = LossConfig(kl=0.01, haar=0.3)
    loss, terms = autoencoder_loss(fresh(), shapes(), config, generator(), 1)
    weights = {
        name: getattr(config, name) for name in ("l1", "gradient", "haar", "spectral", "kl", "equivariance")
    }
    assert loss.item() == pytest.approx(sum(w * terms[name].item() for name, w in weights.items()), rel=1e-5)
    assert terms["loss"].item() == loss.item()
    assert not any(value.requires_grad for value in terms.values())


def test_kl_is_summed_over_latents_and_shared_by_pixel_values():
    model, pixels = fresh(), shapes()
    _, terms = autoencoder_loss(model, pixels, LossConfig(), generator(), 1)
    assert terms["kl"].item() == pytest.approx(
        model.encode(pixels).kl().sum().item() / pixels.numel(), rel=1e-5
    )


def test_the_adversarial_term_starts_on_time_and_spares_the_discriminator():
    model, pixels = fresh(), shapes()
    critic = Discriminator(DiscriminatorConfig(width=8, layers=2))
    config = LossConfig(adversarial=0.5, adversarial_start=10)
    _, early = autoencoder_loss(model, pixels, config, generator(), 9, critic)
    assert "adversarial" not in early
    loss, logs = autoencoder_loss(model, pixels, config, generator(), 10, critic)
    plain, _ = autoencoder_loss(model, pixels, replace(config, adversarial=0), generator(), 10, critic)
    expected = plain + 0.5 * logs["adaptive_weight"] * logs["adversarial"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0 < logs["adaptive_weight"] <= 1e4
    loss.backward()
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert model.last_layer.grad is not None


def test_the_discriminator_learns_to_tell_and_spares_the_autoencoder():
    model, pixels = fresh(), shapes(64)
    torch.manual_seed(0)
    critic = Discriminator(DiscriminatorConfig(width=8, layers=2))
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    config = LossConfig(adversarial=0.5, adversarial_start=3)
    loss, _ = discriminator_loss(model, critic, pixels, config, generator(), 2)
    assert loss.item() == 0
    for step in range(3, 63):
        loss, logs = discriminator_loss(model, critic, pixels, config, generator(step), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert logs["logits_real"] > logs["logits_fake"] + 1
    assert all(p.grad is None for p in model.parameters())


def test_latent_statistics_stream_to_the_whole_answer_and_normalise():
    model = fresh()
    pixels = torch.rand(7, 3, 1, 16, 24, generator=generator()) * 2 - 1
    mean, std = latent_statistics(model, [pixels[:2], pixels[2:3], pixels[3:]])
    with torch.no_grad():
        latent = model.encode(pixels).mode().double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean.double(), latent.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.double(), latent.std(1, correction=0), rtol=1e-5, atol=1e-6)
    model.set_statistics(mean, std)
    with torch.no_grad():
        normalised = model.encode_normalized(pixels).movedim(1, 0).flatten(1)
    torch.testing.assert_close(normalised.mean(1), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.std(1, correction=0), torch.ones(8), rtol=1e-4, atol=0)


def test_latent_statistics_keep_their_digits_far_from_zero():
    model = Autoencoder(AutoencoderConfig(factor=1))
    offset = 1000.0
    pixels = torch.randn(4, 3, 1, 8, 8, generator=generator()).double() + offset
    mean, std = latent_statistics(model, pixels.split(1))
    torch.testing.assert_close(
        std, pixels.movedim(1, 0).flatten(1).std(1, correction=0).float(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3, 4)).float())


def test_latent_statistics_of_nothing_are_refused():
    with pytest.raises(InputError):
        latent_statistics(fresh(), [])


def test_only_scales_that_divide_the_latent_are_drawn():
    config = LossConfig(equivariance_scales=(2, 4))
    drawn = {draw_shrink((8, 8), config, generator(seed)) for seed in range(20)}
    assert drawn == {2, 4}
    assert {draw_shrink((6, 8), config, generator(seed)) for seed in range(20)} == {2}
    assert draw_shrink((3, 8), config, generator()) == 1


def test_wrapped_models_are_found_and_others_refused():
    model = fresh()
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert unwrapped(wrapper) is model
    with pytest.raises(InputError):
        unwrapped(torch.nn.Linear(1, 1))
