"""Layers between frames: a picture is a clip of one frame, nothing looks ahead, and pieces are the whole."""

import itertools

import pytest
import torch

from sfumato.autoencoder.causal import STRIDE, Causal, CausalConfig, latents_of
from sfumato.errors import InputError

CONFIG = CausalConfig(channels=3, width=16, encoder_blocks=1, decoder_blocks=2)


def awake(seed: int = 0) -> Causal:
    """Random weights throughout, where fresh ones would add nothing."""
    torch.manual_seed(seed)
    model = Causal(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def frames(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, count, 6, 5, generator=torch.Generator().manual_seed(seed))


def test_a_single_frame_is_the_picture_to_the_bit_there_and_back():
    model, one = awake(), frames(1)
    assert torch.equal(model.encode(one), one)
    assert torch.equal(model.decode(one), one)
    many = frames(9)
    assert torch.equal(model.encode(many)[:, :, :1], many[:, :, :1])


def test_fresh_layers_keep_every_fourth_frame_and_go_straight_between():
    model, clip = Causal(CONFIG), frames(9)
    latent = model.encode(clip)
    assert torch.equal(latent, clip[:, :, ::STRIDE])
    back = model.decode(latent)
    torch.testing.assert_close(back[:, :, ::STRIDE], clip[:, :, ::STRIDE])
    middle = (latent[:, :, 0] + latent[:, :, 1]) / 2
    torch.testing.assert_close(back[:, :, 2], middle)


@pytest.mark.parametrize("cuts", [(1, 4), (2, 3), (1, 1, 1, 1, 1), (3, 1, 1)])
def test_a_clip_in_pieces_is_the_clip_whole(cuts):
    model, clip = awake(), frames(17)
    latent = model.encode(clip)
    assert latent.shape == (2, 3, 5, 6, 5)
    whole = model.decode(latent)
    assert whole.shape == clip.shape
    found, back, cache, memory, at = [], [], None, None, 0
    for count in cuts:
        size = STRIDE * count - (0 if cache else STRIDE - 1)
        piece, cache = model.encode_more(clip[:, :, at : at + size], cache)
        at += size
        found.append(piece)
        piece, memory = model.decode_more(piece, memory)
        back.append(piece)
    torch.testing.assert_close(torch.cat(found, 2), latent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(back, 2), whole, rtol=1e-5, atol=1e-5)


def test_nothing_looks_ahead_and_all_that_is_behind_may_matter():
    model, clip = awake(), frames(13)
    latent, changed = model.encode(clip), clip.clone()
    changed[:, :, 6] += 1  # in the second group of four
    moved = (model.encode(changed) - latent).abs().amax((0, 1, 3, 4))
    assert (moved[:2] == 0).all() and moved[2] > 0 and moved[3] == 0
    other = latent.clone()
    other[:, :, 2] += 1
    moved = (model.decode(other) - model.decode(latent)).abs().amax((0, 1, 3, 4))
    assert (moved[:5] == 0).all() and (moved[5:] > 0).all()


@pytest.mark.parametrize(("count", "latents"), [(1, 1), (5, 2), (17, 5)])
def test_numbers_of_frames(count, latents):
    assert latents_of(count) == latents


@pytest.mark.parametrize(
    ("count", "near"),
    [
        (2, "is 5"),
        (6, "are 5 and 9"),
        (16, "are 13 and 17"),
        (0, "is 5"),
        (20_000, "is 19997"),
        (10**6, "is 19997"),
    ],
)
def test_other_numbers_are_refused_with_the_nearest(count, near):
    with pytest.raises(InputError, match=f"the nearest {near}$"):
        latents_of(count)


def test_gradients_reach_every_weight():
    model = awake().requires_grad_(True)
    back, latent = model(frames(9))
    (back.square().mean() + latent.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_shapes_are_checked():
    for name, value in itertools.product(("width", "decoder_blocks"), (0, 1.5, True)):
        with pytest.raises(InputError, match=name):
            CausalConfig(**{name: value})
    with pytest.raises(InputError, match="depth"):
        CausalConfig.from_dict({"depth": 3})
