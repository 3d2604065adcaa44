"""The stages composed, with a tiny random model: pictures are functions of their request and their seed."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from helpers import CPU, PROMPT, TINY, apart, array, tiny_system
from sfumato.autoencoder import AutoencoderConfig
from sfumato.drawing.request import levels_of
from sfumato.errors import CheckpointError, InputError
from sfumato.families.pocket import PocketConfig, System, build, save_folder
from sfumato.families.pocket.config import DenoiserConfig
from sfumato.generate import BATCH, Model, load, to_image, to_pixels
from sfumato.sampling import SeededNoise
from sfumato.types import MAX_SEED, Conditioning, Request, SkipLayers

CONFIG = replace(TINY, preset=replace(TINY.preset, steps=3))


def system(config: PocketConfig = CONFIG) -> System:
    """The tiny system, whose latents have statistics of their own."""
    made = tiny_system(config)
    made.autoencoder.latent_mean.copy_(torch.tensor([0.5, -0.5, 0.2, 0.0])[: config.autoencoder.channels])
    made.autoencoder.latent_std.copy_(torch.tensor([1.5, 0.7, 1.0, 2.0])[: config.autoencoder.channels])
    return made


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(system(), CPU, "tiny", dtype=torch.float32)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def each(request) -> Model:
    """The model in both precisions."""
    return Model(system(), CPU, "tiny", dtype=request.param)


# --- what a picture depends on -----------------------------------------------------------------------------------


def test_the_same_request_is_the_same_picture_to_the_bit(each):
    request = Request(PROMPT, seed=3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two = each.generate(request).images[0], each.generate(request).images[0]
    assert one.size == (32, 32) and one.mode == "RGB"
    assert one.tobytes() == two.tobytes()
    assert torch.equal(torch.get_rng_state(), state)  # and nobody else's chance is spent


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "dpmpp_sde"])
def test_picture_k_of_a_batch_is_the_picture_of_seed_plus_k(each, sampler):
    """Matrix products of another height may round otherwise, so that a value near .5 may fall to either side."""
    request = Request(PROMPT, negative="blue", count=5, seed=7, sampler=sampler)
    together = each.generate(request).images
    alone = [each.generate(replace(request, count=1, seed=7 + k)).images[0] for k in range(5)]
    few = 0.005 if each.dtype == torch.float32 else 0.02
    for one, two in zip(together, alone, strict=True):
        assert apart(one, two) <= 1
        assert (array(one) != array(two)).mean() <= few
    assert apart(together[0], together[1]) > 20


def test_requests_larger_than_a_batch(model):
    request = Request(PROMPT, count=BATCH + 2, steps=1, size=(16, 16))
    images = model.generate(request).images
    assert len(images) == BATCH + 2
    last = model.generate(replace(request, count=1, seed=BATCH + 1)).images[0]
    assert apart(images[-1], last) <= 1


def test_seeds_go_round_at_the_end(model):
    around = model.generate(Request(PROMPT, count=2, seed=MAX_SEED, steps=1)).images
    first = model.generate(Request(PROMPT, seed=0, steps=1)).images[0]
    assert apart(around[1], first) <= 1


def test_prompts_of_a_batch_may_come_in_any_order(each):
    prompts = ["a red cube", "", "a blue sphere, very long and spelt", "a sphere"]
    seeds = [5, 6, 7, 8]
    pixels = each.generate_pixels(prompts, seeds, negative="blue")
    assert pixels.shape == (4, 3, 32, 32)
    order = [2, 0, 3, 1]
    mixed = each.generate_pixels([prompts[i] for i in order], [seeds[i] for i in order], negative="blue")
    assert (mixed - pixels[order]).abs().max() <= (1e-4 if each.dtype == torch.float32 else 0.1)
    alone = each.generate(Request(prompts[0], negative="blue", seed=5)).images[0]
    assert apart(alone, to_image(pixels[0][:, None])) <= (1 if each.dtype == torch.float32 else 12)


def test_the_prompt_the_negative_and_the_guidance_each_matter(model):
    base = Request(PROMPT, seed=1)
    first = model.generate(base).images[0]
    for change in ({"prompt": "a blue sphere"}, {"negative": "blue"}, {"guidance": 5.0}, {"seed": 2}):
        assert apart(model.generate(replace(base, **change)).images[0], first) > 3, change


def test_without_guidance_the_negative_is_not_read(model):
    one, two = (model.generate(Request(PROMPT, negative=n, guidance=1.0)).images[0] for n in ("", "blue"))
    assert one.tobytes() == two.tobytes()


def test_guidance_goes_on_from_negative_to_wanted(model):
    cond = model.condition(Request(PROMPT, negative="blue"))
    x, sigma = torch.randn(3, 4, 1, 8, 8), torch.tensor(0.6)
    wanted = model.denoiser(cond, 1.0)(x, sigma)
    unwanted = model.denoiser(cond, 0.0)(x, sigma)
    torch.testing.assert_close(
        model.denoiser(cond, 2.5)(x, sigma), unwanted + 2.5 * (wanted - unwanted), atol=1e-4, rtol=1e-4
    )
    alone = model.denoiser(model.condition(["blue", "blue"]), 1.0)(x, sigma)
    torch.testing.assert_close(alone, unwanted, atol=1e-4, rtol=1e-4)


def test_guidance_rests_outside_its_interval():
    resting = Model(
        system(replace(CONFIG, preset=replace(CONFIG.preset, interval=(0.2, 0.5)))), CPU, dtype=torch.float32
    )
    cond = resting.condition(Request(PROMPT, negative="blue"))
    x = torch.randn(1, 4, 1, 8, 8)
    for sigma, guided in ((0.1, False), (0.2, False), (0.3, True), (0.5, True), (0.6, False)):
        level = torch.tensor(sigma, dtype=torch.float64)
        same = torch.equal(resting.denoiser(cond, 4.0)(x, level), resting.denoiser(cond, 1.0)(x, level))
        assert same is not guided, sigma


def test_skip_layer_guidance_goes_away_from_a_network_that_lacks_layers(model):
    request = Request(PROMPT, negative="blue", steps=10, guidance=3.0, schedule="linear", sampler="euler")
    cond = model.condition(request)
    x = torch.randn(2, 4, 1, 8, 8)
    layers = (0,)
    skip = SkipLayers(layers, 2.5, (0.01, 0.3))
    plain, pushed = model.denoiser(cond, request), model.denoiser(cond, replace(request, skip_layers=skip))
    wanted = cond.change(lambda rows: rows[:1].expand(2, *rows.shape[1:]))
    for sigma, acts in ((1.0, False), (0.9, True), (0.85, True), (0.8, True), (0.7, False), (0.1, False)):
        level = torch.tensor(sigma, dtype=torch.float64)
        want = plain(x, level)
        if acts:
            lacking = x - sigma * model.system.network(x, level.float(), wanted, layers)
            want = want + 2.5 * (model.denoiser(cond, 1.0)(x, level) - lacking)
        torch.testing.assert_close(pushed(x, level), want, atol=1e-4, rtol=1e-4)


def test_skip_layers_that_are_not_there_are_refused(model):
    with pytest.raises(InputError, match="names the layer 99; this model's network has 0 to"):
        model.complete(Request(PROMPT, skip_layers=SkipLayers((0, 99))))
    with pytest.raises(InputError, match="knows nothing of `text_length`"):
        model.complete(Request(PROMPT, text_length=77))


def test_a_schedule_by_the_picture_s_size_knows_it(model):
    small, large = (
        levels_of(model, model.complete(Request(PROMPT, schedule="flow_dynamic", steps=4, size=size)))
        for size in ((32, 32), (256, 256))
    )
    assert (large[1:-1] > small[1:-1]).all()


# --- requests ------------------------------------------------------------------------------------------------------


def test_what_is_open_comes_from_the_preset(model):
    request = model.complete(Request(PROMPT))
    assert (request.steps, request.guidance, request.sampler) == (3, 3.0, "dpmpp_2m")
    assert (request.schedule, request.size) == ("linear", (32, 32))
    assert model.complete(Request(PROMPT, steps=5, guidance=0.0)).guidance == 0.0


def test_other_shapes_than_the_preset(model):
    assert model.generate(Request(PROMPT, size=(48, 20), steps=1)).images[0].size == (48, 20)


@pytest.mark.parametrize("size, nearest", [((33, 32), "32x32"), ((31, 50), "32x48"), ((1, 4094), "4x4096")])
def test_an_illegal_size_is_answered_by_the_nearest_legal(model, size, nearest):
    with pytest.raises(
        InputError, match=f"multiple of 4 pixels; the nearest legal size is {nearest}"
    ) as caught:
        model.generate(Request(PROMPT, size=size))
    assert caught.value.argument == "size"
    width, height = map(int, nearest.split("x"))
    model.complete(Request(PROMPT, size=(width, height)))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sampler": "eiler"}, "eiler.*euler"),
        ({"schedule": "karas"}, "karas.*karras"),
        ({"steps": 0}, "steps"),
        ({"prompt": "x" * 100}, "needs 103 tokens .* at most 64"),
        ({"negative": "x" * 100}, "needs 103 tokens"),
    ],
)
def test_bad_requests_are_refused_before_any_work(model, change, said):
    with pytest.raises(InputError, match=said):
        model.generate(replace(Request(PROMPT), **change), on_step=lambda step: pytest.fail("work was begun"))


def test_the_recipe_is_enough_to_draw_the_picture_again(model, tmp_path):
    save_folder(model.system, tmp_path / "tiny")
    first = load(tmp_path / "tiny", "cpu")
    result = first.generate(Request(PROMPT, negative="blue", seed=9, count=2))
    recipe = json.loads(json.dumps(result.recipe))
    assert recipe["sfumato"] == sfumato.__version__ and recipe["torch"] == torch.__version__
    assert recipe["device"] == "cpu" and recipe["seconds"] >= 0
    again = load(recipe["model"], recipe["device"])
    assert again.hashes == recipe["weights"] and set(recipe["weights"]) == {"autoencoder", "denoiser"}
    assert str(again.dtype) == f"torch.{recipe['dtype']}"
    repeated = again.generate(Request.from_dict(recipe["request"]))
    for one, two in zip(result.images, repeated.images, strict=True):
        assert one.tobytes() == two.tobytes()
    assert None not in recipe["request"].values()


def test_hashes_tell_weights_apart(model):
    other = system()
    other.denoiser.dit.latent_in.bias.data[0] += 1e-6
    hashes = Model(other, CPU).hashes
    assert hashes["autoencoder"] == model.hashes["autoencoder"]
    assert hashes["denoiser"] != model.hashes["denoiser"]


# --- steps, cancelling, threads --------------------------------------------------------------------------------------


def test_every_step_is_reported_with_a_picture_that_forms(model):
    seen = []
    result = model.generate(Request(PROMPT, steps=4), on_step=seen.append)
    assert [(step.index, step.total) for step in seen] == [(k, 4) for k in range(4)]
    assert [float(step.sigma) for step in seen] == sorted((float(step.sigma) for step in seen), reverse=True)
    assert all(step.denoised.shape == (1, 4, 1, 8, 8) for step in seen)
    assert apart(model.preview(seen[-1].denoised), result.images[0]) <= 1
    assert model.preview(seen[0].denoised).size == (32, 32)


def test_raising_in_on_step_cancels_and_harms_nothing(model):
    class Enough(Exception):
        pass

    before = model.generate(Request(PROMPT)).images[0]
    seen = []

    def stop(step) -> None:
        seen.append(step.index)
        if step.index == 1:
            raise Enough

    with pytest.raises(Enough):
        model.generate(Request(PROMPT), on_step=stop)
    assert seen == [0, 1]
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert model.generate(Request(PROMPT)).images[0].tobytes() == before.tobytes()


def test_threads_may_share_a_model(each):
    requests = [Request(PROMPT, seed=k, guidance=2.0 + k, size=(32, 16 + 16 * (k % 2))) for k in range(4)]
    expected = [each.generate(request).images[0].tobytes() for request in requests]
    got: dict[int, bytes] = {}

    def draw(k: int) -> None:
        got[k] = each.generate(requests[k]).images[0].tobytes()

    threads = [threading.Thread(target=draw, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[k] for k in range(4)] == expected


# --- the stages alone ------------------------------------------------------------------------------------------------


def test_pictures_become_pixels_and_come_back():
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    pixels = to_pixels(image)
    assert pixels.shape == (3, 1, 5, 7) and pixels.abs().max() <= 1
    assert to_image(pixels).tobytes() == image.tobytes()
    assert to_image(torch.full((3, 1, 2, 2), 9.0)).getpixel((0, 0)) == (255, 255, 255)
    assert to_image(torch.full((3, 1, 2, 2), -9.0)).getpixel((0, 0)) == (0, 0, 0)


def test_encode_then_decode(model):
    images = [Image.new("RGB", (24, 16), color) for color in ("red", "blue")]
    latents = model.encode(images)
    assert latents.shape == (2, 4, 1, 4, 6) and not latents.requires_grad
    torch.testing.assert_close(model.encode(images[0]), latents[:1], atol=1e-5, rtol=1e-5)
    made = model.system.autoencoder
    expected = made.normalize(made.encode(torch.stack([to_pixels(i) for i in images])).mean)
    torch.testing.assert_close(latents, expected)
    decoded = model.decode(latents)
    assert [image.size for image in decoded] == [(24, 16)] * 2
    pixels = made.decode(made.denormalize(expected)).clamp(-1, 1)
    assert apart(decoded[1], to_image(pixels[1])) <= 1


def test_in_pixel_space_encoding_loses_nothing():
    denoiser = DenoiserConfig(64, 1, 1, patch=4, text_width=64, text_depth=1, prediction="x")
    pixel = replace(CONFIG, autoencoder=AutoencoderConfig(factor=1), denoiser=denoiser)
    torch.manual_seed(0)
    model = Model(build(pixel), CPU, dtype=torch.float32)
    values = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    assert model.decode(model.encode(Image.fromarray(values)))[0].tobytes() == values.tobytes()
    assert model.generate(Request(PROMPT)).images[0].size == (32, 32)


def test_encode_refuses_what_it_cannot_use(model):
    with pytest.raises(InputError, match="one size"):
        model.encode([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 12))])
    with pytest.raises(InputError, match="nearest legal size is 8x12"):
        model.encode(Image.new("RGB", (8, 11)))
    with pytest.raises(InputError, match="at least one"):
        model.encode([])
    grey = model.encode(Image.new("L", (8, 8), 77))
    assert torch.equal(grey, model.encode(Image.new("RGB", (8, 8), (77, 77, 77))))


def test_the_stages_by_hand_are_generate(model):
    request = model.complete(Request(PROMPT, seed=4, sampler="euler", steps=3))
    cond = model.condition(request)
    assert isinstance(cond, Conditioning) and len(cond.tokens) == 2
    denoise = model.denoiser(cond, request)
    x = SeededNoise([4], (4, 1, 8, 8)).initial()
    for sigma, following in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        x = x + (x - denoise(x, torch.tensor(sigma, dtype=torch.float64))) / sigma * (following - sigma)
    assert apart(model.decode(x)[0], model.generate(request).images[0]) <= 1


def test_one_condition_serves_as_many_pictures_as_wished(model):
    x, sigma = torch.randn(3, 4, 1, 8, 8), torch.tensor(0.5)
    shared = model.denoiser(model.condition([PROMPT, "blue"]), 3.0)(x, sigma)
    each = model.denoiser(model.condition([PROMPT] * 3 + ["blue"] * 3), 3.0)(x, sigma)
    torch.testing.assert_close(shared, each, atol=1e-4, rtol=1e-4)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no model"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds neither model\.json nor model_index\.json"):
        load(tmp_path)
    with pytest.raises(InputError, match="device"):
        load(tmp_path, "abacus")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_models_are_drawn_in_what_is_asked_for(dtype):
    model = load(dtype=dtype)
    result = model.generate(Request("a red cube", steps=1))
    assert result.recipe["dtype"] == str(dtype).removeprefix("torch.")


def test_eight_bits_are_for_checkpoints():
    with pytest.raises(InputError, match="int8 is for checkpoints"):
        load(dtype=torch.int8)
