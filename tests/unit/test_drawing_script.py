"""Prompts that change over the steps, and prompts joined by AND, as a Stable Diffusion draws them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfumato import Request, load
from sfumato.diffusion.guidance import composed_batched
from sfumato.diffusion.schedules import sigmas_for
from sfumato.drawing.script import check_texts, step_at
from sfumato.errors import InputError
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.sampling import SAMPLERS, SeededNoise
from sfumato.types import Conditioning, HiRes
from small_sd import SMALL, write

PLAIN = Request("a cat", seed=3, steps=4, size=(32, 32), guidance=5.0, sampler="euler", schedule="karras")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for kind, system in SMALL.items():
            patch.setitem(SYSTEMS, kind, system)
        yield load(write("sd1", tmp_path_factory.mktemp("sd1") / "model"), "cpu", dtype=torch.float32)


def drawn(model, prompt: str, **changes) -> torch.Tensor:
    request = model.complete(replace(PLAIN, prompt=prompt, **changes))
    return model.sample(model.condition(request), request.seeds(), request)


def by_hand(model, prompts: list[str], negatives: list[str | None] | None = None, **changes) -> torch.Tensor:
    """The same, of a prompt for each step, by a denoiser of its own for each: Euler's method remembers nothing."""
    request = model.complete(replace(PLAIN, **changes))
    sigmas = sigmas_for(request.schedule, request.steps, model.system.levels)
    noise = SeededNoise(request.seeds(), model.latent_shape(32, 32), torch.device("cpu"), torch.float32)
    x = noise.initial() * model.system.parameterization.path.prior_scale(float(sigmas[0]))
    with torch.inference_mode():
        for step, prompt in enumerate(prompts):
            negative = None if negatives is None else negatives[step]
            denoise = model.denoiser(model.condition([prompt, negative], request), request)
            x = SAMPLERS["euler"](
                denoise, x, sigmas[step : step + 2], path=model.system.parameterization.path, noise=noise
            )
    return x


def test_a_level_belongs_to_the_step_that_begins_at_or_above_it():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 0.0])
    for level, step in ((9.0, 1), (8.0, 1), (4.001, 1), (4.0, 2), (2.1, 2), (2.0, 3), (0.1, 3), (0.0, 3)):
        assert step_at(sigmas, torch.tensor(level)) == step, level
    assert step_at(sigmas, torch.tensor([0.1, 4.0])) == 2


@pytest.mark.parametrize(
    ("prompt", "steps"),
    [
        ("a [cat:dog:1]", ["a cat", "a dog", "a dog", "a dog"]),
        ("a [cat:dog:0.5]", ["a cat", "a cat", "a dog", "a dog"]),
        ("a [cat|dog|]", ["a cat", "a dog", "a ", "a cat"]),
        ("a ([cat::3]:1.4)", ["a (cat:1.4)"] * 3 + ["a (:1.4)"]),
    ],
)
def test_each_step_is_told_its_prompt(model, prompt, steps):
    torch.testing.assert_close(drawn(model, prompt), by_hand(model, steps), atol=1e-4, rtol=1e-4)


def test_the_negative_prompt_changes_too(model):
    changed = drawn(model, "a cat", negative="[fog:rain:2]")
    negatives = ["fog", "fog", "rain", "rain"]
    torch.testing.assert_close(changed, by_hand(model, ["a cat"] * 4, negatives), atol=1e-4, rtol=1e-4)


def test_an_edit_outside_the_steps_changes_nothing(model):
    assert isinstance(model.condition(replace(PLAIN, prompt="a [cat:dog:0]")), Conditioning)
    assert torch.equal(drawn(model, "a [cat:dog:0]"), drawn(model, "a dog"))
    assert torch.equal(drawn(model, "a [cat:dog:4]"), drawn(model, "a cat"))
    assert not torch.equal(drawn(model, "a cat"), drawn(model, "a dog"))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "dpmpp_sde", "unipc"])
def test_every_sampler_goes_through_a_change(model, sampler):
    """Those with a memory keep it, and a first half of equal prompts is an equal first half."""
    changed, plain = (drawn(model, p, sampler=sampler, steps=6) for p in ("a [cat:dog:3]", "a cat"))
    assert torch.isfinite(changed).all() and not torch.equal(changed, plain)
    assert torch.equal(drawn(model, "a [cat:cat:3]", sampler=sampler, steps=6), plain)


def test_a_picture_does_not_depend_on_its_batch(model):
    request = replace(PLAIN, prompt="a [cat|dog] AND fog :0.4", count=3)
    together = drawn(model, request.prompt, count=3)
    for k in range(3):
        alone = drawn(model, request.prompt, seed=request.seed + k)
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_picture_begun_with_is_told_what_its_levels_are(model):
    """Strength 0.5 runs the last two of four steps, which come after the change."""
    image = model.decode(drawn(model, "a sea"))[0]
    changed, plain = (
        model.generate(replace(PLAIN, prompt=prompt, image=image, strength=0.5)).images[0].tobytes()
        for prompt in ("a [cat:dog:2]", "a dog")
    )
    assert changed == plain


def test_a_second_pass_has_seen_the_changes_of_the_first(model):
    hires = HiRes(2.0, strength=1.0, upscaler="latent-nearest")
    first = replace(PLAIN, prompt="[cat:dog:3]", hires=hires)
    told = []
    inner = type(model.system).condition

    def listen(system, prompts, request):
        told.append((prompts[0], request.size))
        return inner(system, prompts, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.system), "condition", listen)
        model.generate(first)
    assert told == [("cat", (32, 32)), ("dog", (32, 32)), ("dog", (64, 64))]


def test_joined_prompts_add_their_weighted_answers(model):
    request = model.complete(replace(PLAIN, prompt="a cat :0.7 AND a red dog :-0.4 AND fog", guidance=3.0))
    x, sigma = torch.randn(2, 4, 1, 8, 8), torch.tensor(2.0, dtype=torch.float64)

    def alone(prompt: str | None, guidance: float) -> torch.Tensor:
        return model.denoiser(model.condition([prompt, None], request), guidance)(x, sigma)

    with torch.inference_mode():
        joined = model.denoiser(model.condition(request), request)(x, sigma)
        none = alone("a cat", 0.0)
        parts = [(0.7, "a cat"), (-0.4, "a red dog"), (1.0, "fog")]
        expected = none + 3.0 * sum(w * (alone(prompt, 1.0) - none) for w, prompt in parts)
    torch.testing.assert_close(joined, expected.float(), atol=1e-4, rtol=1e-4)


def test_a_prompt_joined_with_another_of_no_weight_is_itself(model):
    torch.testing.assert_close(
        drawn(model, "a cat AND a dog :0"), drawn(model, "a cat"), atol=1e-4, rtol=1e-4
    )


def test_joined_prompts_each_have_their_own_steps(model):
    torch.testing.assert_close(
        drawn(model, "[a cat:a dog:2] AND [a dog:a cat:2] :0"),
        drawn(model, "[a cat:a dog:2]"),
        atol=1e-4,
        rtol=1e-4,
    )


def test_composition_is_exact_on_numbers():
    """1, 2 and 10 as answers to two conditions and to none: 10 + 2 (0.5 (1 − 10) + 3 (2 − 10))."""

    def both(x, sigma):
        return torch.cat([torch.full_like(x[: len(x) // 2], 1.0), torch.full_like(x[len(x) // 2 :], 10.0)])

    def other(x, sigma):
        return torch.full_like(x, 2.0)

    x = torch.zeros(1, 1)
    assert composed_batched(both, [other], [0.5, 3.0], 2.0)(x, 1.0).item() == 10 + 2 * (0.5 * -9 + 3 * -8)
    resting = composed_batched(both, [other], [0.5, 3.0], 2.0, interval=(0.0, 0.5))
    assert resting(x, 1.0).item() == 10 + (0.5 * -9 + 3 * -8)


def test_deep_features_are_reused_by_each_prompt_for_itself(model):
    for prompt in ("a [cat|dog]", "a cat AND a dog"):
        exact, reused = drawn(model, prompt), drawn(model, prompt, reuse=2)
        assert torch.isfinite(reused).all() and not torch.equal(exact, reused)
    pair = drawn(model, "a cat AND a dog :0", reuse=2)
    torch.testing.assert_close(pair, drawn(model, "a cat", reuse=2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rules", ["comfy", "compel", "none"])
def test_other_rules_read_the_marks_as_text(model, rules):
    request = replace(PLAIN, prompt="a [cat:dog:2] AND fog", prompt_rules=rules)
    assert isinstance(model.condition(request), Conditioning)


def test_a_model_without_such_rules_reads_them_as_text():
    pocket = load("pocket", "cpu", dtype=torch.float32)
    request = Request("a red cube AND a [cone:ring:1]", steps=2)
    together, alone = pocket.condition(request), pocket.condition([request.prompt, None], request)
    assert torch.equal(together.tokens, alone.tokens)


def test_a_script_needs_the_request(model):
    told = model.condition(replace(PLAIN, prompt="a [cat:dog:2]"))
    with pytest.raises(InputError, match="need the request"):
        model.denoiser(told, 3.0)


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"prompt": "a (cat:200)"}, "prompt"),
        ({"prompt": "a [cat:(dog:200):3]"}, "prompt"),
        ({"prompt": "a cat AND a (dog:200)"}, "prompt"),
        ({"prompt": "a cat", "negative": "[(fog:-200)|rain]"}, "negative"),
        ({"prompt": "a cat AND a dog :200"}, "prompt"),
    ],
)
def test_what_cannot_be_read_is_told_without_a_network(model, fields, argument, monkeypatch):
    monkeypatch.setattr(type(model.system), "condition", None)
    with pytest.raises(InputError, match="weight") as refused:
        check_texts(model, model.complete(replace(PLAIN, **fields)))
    assert refused.value.argument == argument
    check_texts(model, model.complete(replace(PLAIN, prompt="a [cat:dog:2] " * 200, negative="fog")))


def test_pocket_s_tokens_are_counted_without_a_network(monkeypatch):
    pocket = load("pocket", "cpu")
    monkeypatch.setattr(type(pocket.system), "condition", None)
    for fields in (
        {"prompt": "unheard " * 40},
        {"negative": "unheard " * 40},
        {"prompt": "unheard " * 40, "frames": 9},
    ):
        name = "negative" if "negative" in fields else "prompt"
        with pytest.raises(InputError, match=f"the {name} needs 361 tokens and .* at most 128") as refused:
            check_texts(pocket, pocket.complete(Request(**fields)))
        assert refused.value.argument == name
    check_texts(
        pocket, pocket.complete(Request("a [red:blue:2] (cube:500) AND a cone"))
    )  # no rules are read there
