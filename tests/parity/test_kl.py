"""The KL autoencoder against diffusers' AutoencoderKL: the same weights by the same names, the same numbers."""

from __future__ import annotations

import pytest
import torch

from helpers import relative_error

diffusers = pytest.importorskip("diffusers")

from sfumato.autoencoder.banded import decode_banded, encode_banded  # noqa: E402
from sfumato.autoencoder.kl import AutoencoderKL, KLConfig  # noqa: E402

CONFIGS = {
    "4 channels": {"block_out_channels": [16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
    "16 channels without quant convolutions": {
        "block_out_channels": [8, 16, 32, 32],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.0609,
        "scaling_factor": 1.5305,
    },
    "without attention": {
        "block_out_channels": [16, 16],
        "layers_per_block": 2,
        "norm_num_groups": 16,
        "mid_block_add_attention": False,
    },
    "one level": {"block_out_channels": [32], "layers_per_block": 1, "norm_num_groups": 32},
}
FULL = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
THEIRS = "diffusers AutoencoderKL"
CLOSE = 1e-5
SIZES = [(8, 8), (5, 9), (12, 1)]  # cells


def reference(values: dict) -> torch.nn.Module:
    levels = len(values["block_out_channels"])
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **values,
    ).eval()


def pair(values: dict) -> tuple[AutoencoderKL, torch.nn.Module]:
    """Ours and theirs with the same random weights, norms included; loading is strict."""
    torch.manual_seed(0)
    theirs = reference(values)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    ours = AutoencoderKL(KLConfig.from_diffusers(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.requires_grad_(False), theirs.requires_grad_(False)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_names_and_shapes_of_parameters_are_the_same(values):
    ours, theirs = pair(values)
    shapes = [{name: x.shape for name, x in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("values", "count"),
    [
        (FULL, 83_653_863),
        ({**FULL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}, 83_819_683),
    ],
)
def test_the_published_networks_have_their_size(values, count):
    with torch.device("meta"):
        ours = AutoencoderKL(KLConfig.from_diffusers(values))
        theirs = reference(values)
    assert sum(p.numel() for p in ours.parameters()) == count
    shapes = [{name: x.shape for name, x in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


def compare(agrees, configuration, ours, theirs, pixels, latent, **options) -> None:
    """Encoding and decoding, whole and in bands of rows."""
    wanted = theirs.encode(pixels[:, :, 0]).latent_dist
    for how, posterior in (
        ("whole", ours.encode(pixels)),
        ("bands", encode_banded(ours, pixels, **options)),
    ):
        for name in ("mean", "logvar"):
            answer, expected = getattr(posterior, name)[:, :, 0], getattr(wanted, name)
            agrees(f"VAE encode, {how}", configuration, answer, expected, CLOSE, THEIRS)
    picture = theirs.decode(latent[:, :, 0]).sample
    for how, result in (
        ("whole", ours.decode(latent)),
        ("bands", decode_banded(ours, latent, **options)),
    ):
        agrees(f"VAE decode, {how}", configuration, result[:, :, 0], picture, CLOSE, THEIRS)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("cells", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode(agrees, name, cells, order):
    ours, theirs = pair(CONFIGS[name])
    ours = ours.to(memory_format=order)
    f = ours.factor
    pixels = noise(2, 3, 1, cells[0] * f, cells[1] * f).clamp(-1, 1)
    compare(agrees, name, ours, theirs, pixels, noise(2, ours.config.channels, 1, *cells), band=4000)


def test_gradients():
    ours, theirs = pair(CONFIGS["4 channels"])
    latent = noise(1, 4, 1, 4, 4)
    pull = noise(1, 3, 1, 16, 16)
    gradients = []
    for decode in (ours.decode, lambda z: theirs.decode(z[:, :, 0]).sample[:, :, None]):
        z = latent.clone().requires_grad_()
        gradients.append(torch.autograd.grad(decode(z), z, pull)[0])
    assert relative_error(*gradients) < CLOSE


@pytest.mark.full
@pytest.mark.parametrize("channels", [4, 16])
def test_the_published_networks_at_512(agrees, channels):
    quant = channels == 4
    ours, theirs = pair(
        {**FULL, "latent_channels": channels, "use_quant_conv": quant, "use_post_quant_conv": quant}
    )
    pixels, latent = noise(1, 3, 1, 512, 512).clamp(-1, 1), noise(1, channels, 1, 64, 64)
    compare(agrees, f"{channels} channels, 512×512", ours, theirs, pixels, latent)


@pytest.mark.full
def test_bands_of_the_published_network_at_1024(agrees):
    ours, theirs = pair(FULL)
    latent = noise(1, 4, 1, 128, 128)
    result = decode_banded(ours, latent)
    expected = theirs.decode(latent[:, :, 0]).sample
    agrees("VAE decode, bands", "4 channels, 1024×1024", result[:, :, 0], expected, CLOSE, THEIRS)
