"""What is true of the autoencoder whatever its weights: shapes, identity, locality, statistics, errors, round trips."""

import re

import pytest
import torch

from sfumato import storage
from sfumato.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from sfumato.autoencoder.model import FACTORS, ChannelNorm, Upsample, regroup_channels, shrink_planes
from sfumato.errors import InputError

SMALL = {"encoder_width": 32, "decoder_width": 32, "max_width": 64, "decoder_blocks": 1}


def awake(config: AutoencoderConfig, seed: int = 0) -> Autoencoder:
    """An untrained autoencoder whose residual branches are not zero."""
    torch.manual_seed(seed)
    model = Autoencoder(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("channels", [1, 5])
def test_shapes_for_every_factor_and_odd_channel_counts(factor, channels):
    config = AutoencoderConfig(factor=factor, latent_channels=channels, **SMALL)
    model = awake(config)
    pixels = pictures(2, 3, 2, factor * 2, factor * 3)
    posterior = model.encode(pixels)
    expected = (2, 3 if factor == 1 else channels, 2, 2, 3)
    assert posterior.mean.shape == posterior.logvar.shape == expected
    assert expected[1:] == model.latent_shape(2, factor * 2, factor * 3)
    assert model.decode(posterior.mode()).shape == pixels.shape
    assert model.decode(posterior.mode()).dtype == torch.float32


@pytest.mark.parametrize("config", [{}, {"decoder_width": 96}, {"head": 4}, {"stem": 2}, {"max_width": 96}])
def test_widths_and_strides_may_be_chosen_freely(config):
    model = awake(AutoencoderConfig(**{"factor": 8, **SMALL, **config}))
    pixels = pictures(1, 3, 1, 16, 16)
    assert model.decode(model.encode(pixels).mean).shape == pixels.shape


def test_the_default_decoder_is_larger_than_its_encoder():
    model = Autoencoder(AutoencoderConfig())
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder))
    assert encoder < decoder
    assert encoder + decoder < 5_000_000


def test_factor_one_is_the_identity_to_the_bit_without_parameters():
    model = Autoencoder(AutoencoderConfig(factor=1))
    pixels = pictures(2, 3, 2, 5, 7)
    posterior = model.encode(pixels)
    assert torch.equal(posterior.mode(), pixels)
    assert torch.equal(model.decode(posterior.mode()), pixels)
    assert torch.equal(model(pixels).pixels, pixels)
    assert torch.allclose(posterior.sample(torch.randn_like(pixels)), pixels, atol=1e-5)
    assert list(model.parameters()) == []
    with pytest.raises(InputError):
        _ = model.last_layer


def test_frames_and_batch_members_do_not_see_each_other():
    model = awake(AutoencoderConfig(factor=8, **SMALL))
    pixels = pictures(3, 3, 2, 32, 24)
    with torch.no_grad():
        latent = model.encode(pixels).mean
        decoded = model.decode(latent)
        for b in range(3):
            for t in range(2):
                alone = model.encode(pixels[b : b + 1, :, t : t + 1]).mean
                torch.testing.assert_close(alone[0, :, 0], latent[b, :, t], rtol=1e-4, atol=1e-5)
                picture = model.decode(latent[b : b + 1, :, t : t + 1])
                torch.testing.assert_close(picture[0, :, 0], decoded[b, :, t], rtol=1e-4, atol=1e-5)


def test_the_decoder_is_local_so_that_a_far_cell_changes_nothing():
    """What makes tiled decoding exact: the receptive field ends."""
    model = awake(AutoencoderConfig(factor=8, **SMALL))
    latent = torch.randn(1, 16, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    changed = latent.clone()
    changed[..., 0, 0] += 5
    with torch.no_grad():
        difference = (model.decode(latent) - model.decode(changed)).abs().amax((0, 1, 2))
    assert difference[:8, :8].min() > 0
    assert difference[80:, 80:].max() == 0


def test_sub_pixel_convolutions_start_without_a_checkerboard():
    torch.manual_seed(0)
    decoder = Autoencoder(AutoencoderConfig(**SMALL)).decoder
    convolutions = [decoder.out] + [m.conv for m in decoder.modules() if isinstance(m, Upsample)]
    assert len(convolutions) == 4
    for conv in convolutions:
        flat = torch.randn(1, conv.in_channels, 1, 1).expand(-1, -1, 5, 5).contiguous()
        picture = torch.nn.functional.pixel_shuffle(conv(flat), 2)[..., 2:8, 2:8]
        torch.testing.assert_close(picture, picture[..., :1, :1].expand_as(picture))


def test_shortcuts_average_and_repeat_neighbouring_channels():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert regroup_channels(x, 3).flatten().tolist() == [0.5, 2.5, 4.5]
    assert regroup_channels(x, 12).flatten().tolist() == [v for v in range(6) for _ in range(2)]
    assert regroup_channels(x, 4).flatten().tolist() == pytest.approx([1 / 3, 5 / 3, 10 / 3, 14 / 3])
    assert torch.equal(regroup_channels(x, 6), x)


def test_channel_norm_equals_its_formula():
    x = torch.randn(2, 8, 3, 4)
    norm = ChannelNorm(8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    scaled = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-6)
    torch.testing.assert_close(norm(x), scaled * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))


def test_kl_matches_torch_distributions():
    mean, logvar = torch.randn(2, 4, 1, 3, 3), torch.randn(2, 4, 1, 3, 3)
    ours = Posterior(mean, logvar).kl()
    normal = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    theirs = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(ours, theirs)


def test_sampling_uses_the_noise_it_is_given_and_logvar_is_clamped():
    model = awake(AutoencoderConfig(factor=4, **SMALL))
    with torch.no_grad():
        model.encoder.out.bias[16:] = 1e4
        high = model.encode(pictures(1, 3, 1, 8, 8))
        model.encoder.out.bias[16:] = -1e4
        low = model.encode(pictures(1, 3, 1, 8, 8))
    assert high.logvar.unique().tolist() == [20.0]
    assert low.logvar.unique().tolist() == [-30.0]
    noise = torch.randn_like(high.mean)
    torch.testing.assert_close(high.sample(noise), high.mean + torch.exp(torch.tensor(10.0)) * noise)


def test_normalisation_inverts_and_is_exact_per_channel():
    model = awake(AutoencoderConfig(factor=4, latent_channels=3, **SMALL))
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 4.0, 2.0])
    model.set_statistics(mean, std)
    pixels = pictures(2, 3, 1, 8, 8)
    latent = model.encode(pixels).mode()
    normalised = model.encode_normalized(pixels)
    torch.testing.assert_close(normalised[:, 1], (latent[:, 1] + 2) / 4)
    torch.testing.assert_close(model.denormalize(normalised), latent)
    torch.testing.assert_close(model.decode_normalized(normalised), model.decode(latent))


@pytest.mark.parametrize(
    "mean, std",
    [
        (torch.zeros(2), torch.ones(3)),
        (torch.zeros(3), torch.tensor([1.0, 0.0, 1.0])),
        (torch.full((3,), float("nan")), torch.ones(3)),
    ],
)
def test_impossible_statistics_are_refused(mean, std):
    model = Autoencoder(AutoencoderConfig(factor=1))
    with pytest.raises(InputError):
        model.set_statistics(mean, std)


@pytest.mark.parametrize(
    "size, nearest",
    [((100, 128), "128x96"), ((128, 8), "16x128"), ((1, 1), "16x16"), ((130, 250), "256x128")],
)
def test_a_wrong_size_names_the_nearest_legal_one(size, nearest):
    model = Autoencoder(AutoencoderConfig(**SMALL))
    with pytest.raises(InputError, match=re.escape(nearest)) as caught:
        model.encode(pictures(1, 3, 1, *size))
    assert caught.value.argument == "size"


def test_wrong_shapes_are_refused_by_name():
    model = Autoencoder(AutoencoderConfig(**SMALL))
    with pytest.raises(InputError, match="pixels"):
        model.encode(pictures(1, 4, 1, 16, 16))
    with pytest.raises(InputError, match="pixels"):
        model.encode(pictures(1, 3, 16, 16))
    with pytest.raises(InputError, match="latent"):
        model.decode(torch.zeros(1, 15, 1, 2, 2))


@pytest.mark.parametrize(
    "values",
    [
        {"factor": 3},
        {"factor": 64},
        {"latent_channels": 0},
        {"latent_channels": 2.5},
        {"encoder_width": 40},
        {"stem": 3},
        {"depth": 2},
    ],
)
def test_impossible_configs_are_refused_by_name(values):
    with pytest.raises(InputError) as caught:
        AutoencoderConfig.from_dict(values)
    assert caught.value.argument == next(iter(values))


def test_config_survives_its_dictionary():
    config = AutoencoderConfig(factor=32, latent_channels=7, decoder_blocks=3)
    assert AutoencoderConfig.from_dict(config.to_dict()) == config


def test_weights_and_statistics_survive_a_file(tmp_path):
    model = awake(AutoencoderConfig(factor=8, **SMALL))
    model.set_statistics(torch.randn(16), torch.rand(16) + 0.5)
    path = tmp_path / "autoencoder.safetensors"
    storage.save_tensors(path, model.state_dict())
    other = Autoencoder(AutoencoderConfig(factor=8, **SMALL))
    other.load_state_dict(storage.load_tensors(path), strict=True)
    pixels = pictures(1, 3, 1, 16, 24)
    assert torch.equal(other.encode_normalized(pixels), model.encode_normalized(pixels))
    latent = model.encode_normalized(pixels)
    assert torch.equal(other.decode_normalized(latent), model.decode_normalized(latent))
    assert storage.tensors_hash(other.state_dict()) == storage.tensors_hash(model.state_dict())


def test_shrinking_averages_cells_of_every_frame():
    x = torch.arange(16.0).view(1, 1, 1, 4, 4).repeat(1, 2, 3, 1, 1)
    small = shrink_planes(x, 2)
    assert small.shape == (1, 2, 3, 2, 2)
    assert small[0, 1, 2].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
