"""Drawing from a picture, with a tiny random model: what each task keeps, and what it is equal to."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import CPU, PROMPT, apart, array, noise, tiny_system, white
from sfumato.diffusion.path import FLOW, VE, VP
from sfumato.diffusion.schedules import sigmas_for
from sfumato.errors import InputError
from sfumato.families.pocket import System
from sfumato.generate import Model, eta_samplers, to_image
from sfumato.pictures import fingerprint, flatten
from sfumato.receipts.provenance import recipe_of
from sfumato.sampling import SAMPLERS
from sfumato.tasks.latent import Origin, begin, cells_to_paint, enlarged, keeping, steps_to_run
from sfumato.types import HiRes, Inpaint, Request, Variation


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny_system(), CPU, "tiny", dtype=torch.float32)


IMAGE = noise(32, 32)
MASK = white(32, 32, 9, 6, 22, 27)


def drawn(model: Model, **fields) -> Image.Image:
    [image] = model.generate(Request(PROMPT, **fields)).images
    return image


def through_the_autoencoder(model: Model, image: Image.Image) -> Image.Image:
    return model.decode(model.encode(image))[0]


# --- image to image --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "dpmpp_sde"])
def test_strength_1_is_text_to_image_and_0_the_autoencoder(model, sampler):
    fields = {"seed": 3, "sampler": sampler}
    from_noise = drawn(model, **fields)
    assert drawn(model, image=IMAGE, strength=1.0, **fields).tobytes() == from_noise.tobytes()
    untouched = drawn(model, image=IMAGE, strength=0.0, **fields)
    assert untouched.tobytes() == through_the_autoencoder(model, IMAGE).tobytes()
    between = drawn(model, image=IMAGE, strength=0.5, **fields)
    assert apart(between, from_noise) > 10 and apart(between, untouched) > 10


def test_the_picture_shows_through(model):
    one, two = (drawn(model, image=image, strength=0.5) for image in (IMAGE, noise(32, 32, 1)))
    assert apart(one, two) > 10


def test_the_picture_may_have_another_shape_than_the_preset(model):
    assert drawn(model, image=noise(48, 20), strength=0.5).size == (48, 20)
    assert drawn(model, image=noise(50, 37), strength=0.5, fit="cover", size=(24, 16)).size == (24, 16)


def test_only_the_last_steps_are_run(model):
    seen = []
    model.generate(Request(PROMPT, image=IMAGE, strength=0.6, steps=5), on_step=seen.append)
    sigmas = sigmas_for("linear", 5, model.system.levels)
    assert [step.sigma for step in seen] == pytest.approx(sigmas[2:5].tolist())
    assert [(step.index, step.total) for step in seen] == [(0, 3), (1, 3), (2, 3)]


@given(steps=st.integers(1, 1000), strength=st.floats(0, 1))
def test_steps_are_counted_downwards(steps, strength):
    if strength > 0 and steps * strength < 1:
        with pytest.raises(InputError, match="less than one step"):
            steps_to_run(steps, strength)
        return
    count = steps_to_run(steps, strength)
    assert 0 <= count <= steps and count <= steps * strength < count + 1


def test_a_strength_of_less_than_a_step_names_the_least(model):
    with pytest.raises(
        InputError, match=r"strength 0.1 of 4 steps is less than one step; give at least 0.25"
    ) as e:
        model.complete(Request(PROMPT, image=IMAGE, strength=0.1))
    assert e.value.argument == "strength"


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda path: path.name)
def test_sampling_begins_with_the_picture_under_noise(path):
    sigmas = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    latent, eps = torch.randn(1, 4, 1, 3, 5), torch.randn(2, 4, 1, 3, 5)
    left, x = begin(sigmas, Origin(latent, 0.7), eps, path)
    assert left.tolist() == sigmas[1:].tolist()
    torch.testing.assert_close(x, path.alpha(0.6) * latent + 0.6 * eps)
    left, x = begin(sigmas, Origin(latent, 1.0), eps, path)
    assert left.tolist() == sigmas.tolist()
    torch.testing.assert_close(x, 0.9 * eps)
    left, x = begin(sigmas, Origin(latent, 0.0), eps, path)
    assert left.tolist() == [0.0] and torch.equal(x, latent.expand(2, -1, -1, -1, -1))


# --- inside a mask -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.sampled_from([0, 0, 0, 100, 255]), min_size=256, max_size=256), blur=st.integers(0, 6),
    strength=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 2**64 - 1),
    sampler=st.sampled_from(["euler", "euler_a", "dpmpp_2m"]),
)  # fmt: skip
def test_outside_any_mask_every_byte_is_the_input_s(model, values, blur, strength, seed, sampler):
    mask = Image.fromarray(np.array([255, *values[1:]], np.uint8).reshape(16, 16))
    image = noise(16, 16, seed % 1000)
    made = drawn(
        model, image=image, mask=mask, inpaint=Inpaint(blur=blur), strength=strength, seed=seed, sampler=sampler,
        steps=2,
    )  # fmt: skip
    outside = np.asarray(mask) < 128
    assert (array(made)[outside] == array(image)[outside]).all()
    assert (array(made)[~outside] != array(image)[~outside]).any()


def test_what_is_painted_depends_on_what_is_kept(model):
    other = IMAGE.copy()
    other.paste("white", (0, 0, 8, 32))
    one, two = (drawn(model, image=image, mask=MASK) for image in (IMAGE, other))
    inside = np.asarray(MASK) > 0
    assert np.abs(array(one)[inside] - array(two)[inside]).max() > 5


def test_a_mask_that_is_white_everywhere_is_no_mask(model):
    everywhere = Image.new("L", (32, 32), 255)
    for strength in (0.5, 1.0):
        masked = drawn(model, image=IMAGE, mask=everywhere, strength=strength)
        assert masked.tobytes() == drawn(model, image=IMAGE, strength=strength).tobytes()


def test_without_paste_the_model_s_own_picture_comes_back(model):
    pasted = drawn(model, image=IMAGE, mask=MASK)
    own = drawn(model, image=IMAGE, mask=MASK, inpaint=Inpaint(paste=False))
    outside, deep = np.asarray(MASK) == 0, np.s_[12:21, 15:16]
    assert (array(own)[outside] != array(IMAGE)[outside]).any()
    assert (array(own)[deep] == array(pasted)[deep]).all()
    wide = noise(256, 16)  # far from the mask it is the picture through the autoencoder
    own = drawn(model, image=wide, mask=white(256, 16, 0, 0, 4, 16), inpaint=Inpaint(paste=False))
    assert np.abs(array(own) - array(through_the_autoencoder(model, wide)))[:, 200:].max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_every_sampler_keeps_the_latent_outside_and_draws_inside(model, sampler, strength):
    request = model.complete(
        Request(PROMPT, image=IMAGE, mask=MASK, sampler=sampler, strength=strength, count=2)
    )
    latent = model.encode(IMAGE)
    mask = torch.from_numpy(np.asarray(MASK) > 0).float()[None, None, None]
    origin = Origin(latent, strength, None, mask)
    made = model.sample(model.condition(request), request.seeds(), request, None, origin)
    cells = cells_to_paint(mask, 8, 8).expand_as(made)
    known = latent.expand_as(made)
    assert torch.equal(made[~cells], known[~cells])
    assert (made[cells] - known[cells]).abs().max() > 0.1
    assert (made[0] - made[1]).abs().max() > 0.1


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda path: path.name)
def test_the_network_is_shown_the_known_part_at_the_level_it_is_asked_for(path):
    latent, eps, x = torch.randn(1, 2, 1, 4, 4), torch.randn(3, 2, 1, 4, 4), torch.randn(3, 2, 1, 4, 4)
    cells = torch.zeros(1, 1, 1, 4, 4, dtype=torch.bool)
    cells[..., 1:3, 2:] = True
    shown = []

    def denoise(x, sigma):
        shown.append(x)
        return torch.full_like(x, 7.0)

    sigma = torch.tensor(0.4, dtype=torch.float64)
    answer = keeping(denoise, latent, cells, eps, path)(x, sigma)
    expected = torch.where(cells, x, path.alpha(0.4) * latent + 0.4 * eps)
    torch.testing.assert_close(shown[0], expected)
    assert torch.equal(answer, torch.where(cells, torch.full_like(x, 7.0), latent.expand_as(x)))


def test_every_cell_with_a_painted_pixel_is_painted():
    mask = torch.zeros(1, 1, 1, 8, 12)
    mask[..., 3, 4] = 1
    assert cells_to_paint(mask, 2, 3)[0, 0, 0].tolist() == [[False, True, False], [False, False, False]]


def test_only_the_surroundings_of_the_mask_of_a_picture_of_any_size(model):
    image, mask = noise(101, 57), white(101, 57, 60, 20, 70, 33)
    made = drawn(model, image=image, mask=mask, inpaint=Inpaint(padding=4))
    outside = np.asarray(mask) == 0
    assert made.size == image.size
    assert (array(made)[outside] == array(image)[outside]).all()
    assert np.abs(array(made)[~outside] - array(image)[~outside]).max() > 20
    elsewhere = image.copy()
    elsewhere.paste("white", (0, 0, 40, 57))  # outside the surroundings nothing matters
    again = drawn(model, image=elsewhere, mask=mask, inpaint=Inpaint(padding=4))
    assert (array(made)[~outside] == array(again)[~outside]).all()


# --- beyond the borders ---------------------------------------------------------------------------------------------


def test_outpainting_keeps_the_picture_and_draws_the_rest(model):
    image = noise(16, 24)
    made = drawn(model, image=image, outpaint=(8, 4, 0, 16))
    assert made.size == (24, 44)
    assert made.crop((8, 4, 24, 28)).tobytes() == image.tobytes()
    edge = Image.fromarray(np.pad(np.asarray(image), ((4, 16), (8, 0), (0, 0)), mode="edge"))
    assert apart(made.crop((0, 0, 8, 44)), edge.crop((0, 0, 8, 44))) > 20
    with pytest.raises(InputError, match=r"with outpaint 17x24.*nearest legal size is 16x24"):
        drawn(model, image=image, outpaint=(1, 0, 0, 0))


# --- variations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "dpmpp_sde", "lcm"])
def test_a_variation_leads_from_the_first_seed_s_picture_to_the_second_s(model, sampler):
    first, second = (drawn(model, seed=seed, sampler=sampler) for seed in (3, 8))
    steps = [drawn(model, seed=3, sampler=sampler, variation=Variation(8, t)) for t in (0.0, 0.02, 0.5, 1.0)]
    assert steps[0].tobytes() == first.tobytes() and steps[3].tobytes() == second.tobytes()
    distance = [np.abs(array(step) - array(first)).mean() for step in steps]
    assert 0 < distance[1] < distance[2]


def test_the_variation_s_seed_counts_the_pictures(model):
    request = Request(PROMPT, seed=3, count=3, variation=Variation(2**64 - 2, 1.0))
    assert request.seeds() == [3, 3, 3]
    images = model.generate(request).images
    for image, seed in zip(images, (2**64 - 2, 2**64 - 1, 0), strict=True):
        assert apart(image, drawn(model, seed=seed)) <= 1


# --- the second pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upscaler", ["lanczos", "latent-nearest", "latent-bilinear", "latent-bicubic"])
def test_the_second_pass(model, upscaler):
    large = drawn(model, seed=3, hires=HiRes(1.5, strength=1.0, upscaler=upscaler))
    assert large.tobytes() == drawn(model, seed=3, size=(48, 48)).tobytes()  # nothing of the first is left
    only = drawn(model, seed=3, hires=HiRes(2, strength=0.0, upscaler=upscaler))
    assert only.size == (64, 64)
    some = drawn(model, seed=3, hires=HiRes(2, strength=0.5, upscaler=upscaler))
    assert apart(some, only) > 10 and apart(some, drawn(model, seed=3, size=(64, 64))) > 10


def test_enlarging_alone(model):
    small = drawn(model, seed=3)
    larger = small.resize((64, 64), Image.Resampling.LANCZOS)
    only = drawn(model, seed=3, hires=HiRes(2, strength=0.0))
    assert apart(only, through_the_autoencoder(model, larger)) <= 1
    given = drawn(model, image=IMAGE, strength=0.0, hires=HiRes(2, strength=0.0))  # a picture of one's own
    larger = IMAGE.resize((64, 64), Image.Resampling.LANCZOS)
    assert given.tobytes() == through_the_autoencoder(model, larger).tobytes()
    latent = drawn(model, image=IMAGE, strength=0.0, hires=HiRes(2, strength=0.0, upscaler="latent-nearest"))
    cells = model.encode(IMAGE).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert latent.tobytes() == model.decode(cells)[0].tobytes()


def test_the_second_pass_is_not_enlarged_again(model):
    """Sixteen times 512 pixels could not be drawn."""
    assert drawn(model, size=(32, 16), hires=HiRes(16, strength=0.0)).size == (512, 256)


@pytest.mark.parametrize("upscaler", ["latent-bilinear", "latent-bicubic", "latent-nearest"])
def test_an_even_latent_stays_even(upscaler):
    latent = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1, 1).expand(3, 2, 1, 4, 5)
    larger = enlarged(latent, 7, 9, upscaler)
    assert larger.shape == (3, 2, 1, 7, 9)
    torch.testing.assert_close(larger, latent[..., :1, :1].expand(3, 2, 1, 7, 9))


def test_the_second_pass_has_its_own_steps(model):
    seen = []
    model.generate(
        Request(PROMPT, steps=2, hires=HiRes(2, steps=6, strength=0.5)),
        on_step=lambda s: seen.append((s.index, s.total)),
    )
    assert seen == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    "hires, said, argument",
    [
        (
            HiRes(1.3),
            "hires.scale 1.3 makes 41.6x41.6 of 32x32.*nearest legal size is 40x40, of scale 1.25",
            "hires.scale",
        ),
        (
            HiRes(2, upscaler="esrgan"),
            'upscaler "esrgan" is unknown; use one of latent-nearest',
            "hires.upscaler",
        ),
        (HiRes(2, strength=0.1), "hires.strength 0.1 of 4 steps is less than one step", "hires.strength"),
        (HiRes(16), "hires.scale 16 makes 4608x512; at most 4096 pixels", "hires.scale"),
    ],
)
def test_second_passes_that_cannot_be(model, hires, said, argument):
    size = (288, 32) if hires.scale == 16 else None
    with pytest.raises(InputError, match=said) as caught:
        model.complete(Request(PROMPT, hires=hires, size=size))
    assert caught.value.argument == argument


# --- what holds for every task -----------------------------------------------------------------------------------


TASKS = {
    "image": {"image": IMAGE, "strength": 0.5},
    "image with fresh noise": {"image": IMAGE, "strength": 0.5, "sampler": "euler_a", "eta": 0.7},
    "mask": {"image": IMAGE, "mask": MASK, "sampler": "dpmpp_sde"},
    "mask without paste": {"image": IMAGE, "mask": MASK, "strength": 0.75, "inpaint": Inpaint(paste=False)},
    "surroundings": {"image": noise(41, 39), "mask": white(41, 39, 3, 3, 9, 20), "inpaint": Inpaint(padding=2)},
    "outpaint": {"image": noise(16, 16), "outpaint": (4, 4, 0, 8)},
    "hires": {"hires": HiRes(1.5, strength=0.5)},
    "hires in latents": {"hires": HiRes(1.5, upscaler="latent-bicubic"), "sampler": "ddim", "eta": 1.0},
    "variation": {"variation": Variation(77, 0.4), "sampler": "dpmpp_2m_sde"},
    "all that go together": {
        "image": IMAGE, "strength": 0.75, "hires": HiRes(2, steps=2), "variation": Variation(77, 0.4),
    },
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_picture_k_of_a_batch_is_the_picture_made_alone(model, task):
    request = Request(PROMPT, negative="blue", count=3, seed=2**64 - 2, **TASKS[task])
    result = model.generate(request)
    again = model.generate(request)
    assert [i.tobytes() for i in result.images] == [i.tobytes() for i in again.images]
    for k, image in enumerate(result.images):
        alone = model.generate(request.part(k)).images[0]
        assert apart(alone, image) <= 1
        assert (array(alone) != array(image)).mean() <= 0.005
        assert recipe_of(result.recipe, k)["request"] == model.complete(request.part(k)).to_dict()
    assert apart(result.images[0], result.images[1]) > 5


@pytest.mark.parametrize("task", TASKS)
def test_the_recipe_is_json_and_with_its_pictures_draws_the_same_again(model, task):
    result = model.generate(Request(PROMPT, seed=5, **TASKS[task]))
    written = json.loads(json.dumps(result.recipe["request"]))
    assert None not in written.values()
    pictures = [TASKS[task][name] for name in ("mask", "image") if name in TASKS[task]]
    again = model.generate(Request.from_dict(written, pictures))
    assert again.images[0].tobytes() == result.images[0].tobytes()
    if pictures:
        assert written["image"] == fingerprint(TASKS[task]["image"])
        with pytest.raises(InputError, match='image names the picture "sha256:'):
            Request.from_dict(written)


@pytest.mark.parametrize("task", TASKS)
def test_a_complete_request_stays_as_it_is(model, task):
    once = model.complete(Request(PROMPT, **TASKS[task]))
    assert model.complete(once) == once


def test_pictures_of_any_mode_are_taken_as_what_they_show(model):
    plain = drawn(model, image=IMAGE, mask=MASK, strength=0.5)
    clear = IMAGE.copy()
    clear.putalpha(255)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = IMAGE.transpose(Image.Transpose.ROTATE_90)
    turned.info["exif"] = exif.tobytes()
    for image, mask in (
        (clear, MASK.convert("RGB")),
        (turned, MASK.convert("1")),
        (IMAGE, MASK.convert("RGBA")),
    ):
        assert flatten(image).tobytes() == IMAGE.tobytes()
        assert drawn(model, image=image, mask=mask, strength=0.5).tobytes() == plain.tobytes()


def test_a_picture_of_numbers_that_are_none_is_refused(model):
    nan = Image.fromarray(np.full((32, 32), np.nan, np.float32))
    with pytest.raises(InputError, match="image holds floating-point values"):
        drawn(model, image=nan)
    with pytest.raises(InputError, match="mask holds floating-point values"):
        drawn(model, image=IMAGE, mask=nan)
    with pytest.raises(InputError, match=r"image must be a PIL picture.*not ndarray"):
        drawn(model, image=np.full((32, 32, 3), np.nan))


# --- eta, and what a system may offer --------------------------------------------------------------------------------


def test_eta_reaches_the_samplers_that_know_it(model):
    assert set(eta_samplers()) == {"euler_a", "ddim", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde"}
    euler = drawn(model, sampler="euler")
    assert apart(drawn(model, sampler="euler_a", eta=0.0), euler) <= 1
    assert drawn(model, sampler="ddim", eta=1.0).tobytes() == drawn(model, sampler="euler_a").tobytes()
    assert apart(drawn(model, sampler="ddim", eta=0.5), euler) > 5
    with pytest.raises(
        InputError,
        match=r"eta means nothing to the sampler euler; leave it out, or use one of euler_a, .*ddim",
    ):
        drawn(model, sampler="euler", eta=0.5)


def test_clip_skip_is_for_those_who_have_the_layers(model):
    assert drawn(model, clip_skip=1).tobytes() == drawn(model).tobytes()
    with pytest.raises(InputError, match="clip_skip 2 is more than this model's text encoder allows, 1"):
        drawn(model, clip_skip=2)


@dataclass(frozen=True)
class Offering:
    """A system with all that one may offer: its network takes 4 + 5 channels, and adds the mean of the five."""

    inner: System
    clip_layers: int = 3

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def condition(self, texts, request):
        cond = self.inner.condition(texts, request)
        return replace(cond, tokens=cond.tokens / (request.clip_skip or 1))

    def inpaint_channels(self, pixels, mask):
        assert ((pixels == 0) | (mask == 0)).all()
        cells = torch.nn.functional.avg_pool3d(mask, (1, 4, 4))
        return torch.cat([cells, self.inner.autoencoder.encode_normalized(pixels)], 1)

    def network(self, x, time, cond):
        assert x.shape[1] == 9
        return self.inner.network(x[:, :4], time, cond) + x[:, 4:].mean(1, keepdim=True)

    def preview(self, latent):
        return latent[:, :3] * 100


@pytest.fixture(scope="module")
def offering() -> Model:
    return Model(Offering(tiny_system()), CPU, "offering", dtype=torch.float32)


def test_an_inpainting_network_is_given_the_mask_and_what_is_kept(model, offering):
    """Its own latents are left alone outside the mask, for it knows what is there; the pixels are kept all the same."""
    made = drawn(offering, image=IMAGE, mask=MASK)
    outside = np.asarray(MASK) == 0
    assert (array(made)[outside] == array(IMAGE)[outside]).all()
    assert apart(made, drawn(model, image=IMAGE, mask=MASK)) > 5
    inner = IMAGE.copy()
    inner.paste("white", (9, 6, 22, 27))  # what lies under the mask is not told
    assert apart(drawn(offering, image=inner, mask=MASK, inpaint=Inpaint(blur=0)),
                 drawn(offering, image=IMAGE, mask=MASK, inpaint=Inpaint(blur=0))) == 0  # fmt: skip


def test_an_inpainting_network_draws_from_text_as_if_under_a_white_mask(offering):
    images = offering.generate(Request(PROMPT, count=2, seed=4, hires=HiRes(1.5, strength=0.5))).images
    assert [image.size for image in images] == [(48, 48)] * 2
    everywhere = Image.new("L", (32, 32), 255)
    for count in (1, 3):
        free = offering.generate(Request(PROMPT, seed=4, count=count)).images
        under = offering.generate(Request(PROMPT, seed=4, count=count, image=IMAGE, mask=everywhere)).images
        assert [a.tobytes() for a in free] == [b.tobytes() for b in under]


def test_a_quick_look_is_taken_where_there_is_one(model, offering):
    latent = torch.randn(2, 4, 1, 8, 8)
    quick = offering.preview(latent)
    assert quick.size == (8, 8) and quick.tobytes() == to_image(latent[0, :3] * 100).tobytes()
    assert model.preview(latent).size == (32, 32)


def test_clip_skip_reaches_the_text_encoder(offering):
    assert drawn(offering, clip_skip=1).tobytes() == drawn(offering).tobytes()
    assert apart(drawn(offering, clip_skip=3), drawn(offering)) > 2
    pixels = offering.generate_pixels([PROMPT], [0], clip_skip=3)
    assert apart(to_image(pixels[0][:, None]), drawn(offering, clip_skip=3)) <= 1
    with pytest.raises(InputError, match=r"clip_skip 4 is more than .* allows, 3"):
        drawn(offering, clip_skip=4)


def test_pixels_by_prompt_and_seed_begin_with_noise_alone(model):
    for name in ("image", "hires", "variation"):
        with pytest.raises(InputError, match=f"leave out {name}"):
            model.generate_pixels([PROMPT], [1], **{name: TASKS[name][name]})
