"""Whole text conditioning against the pipelines of diffusers, from random weights: prompts, inversions, sizes.

Where the oracle cannot be asked (its `clip_skip` for SD 1 and 2 fails with transformers 5.6 and later), its own hidden
states and norm are composed here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from clip_reference import CLOSE, KINDS, PROMPTS, SMALL_L, TIGHT
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.condition import TextOptions
from sfumato.families.sd.condition import (
    NEGATIVE_AESTHETIC,
    PLANS,
    TextStack,
    encode_prompts,
    score_numbers,
    size_numbers,
    size_vector,
)
from sfumato.text.clip import ClipTextEncoder
from sfumato.text.clip_tokens import bundled
from sfumato.text.inversion import Inversion, read_inversion
from sfumato.text.weighting import encode_windows
from sfumato.text.windows import LENGTH, empty_window


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negatives", [["blurry, bad hands", "", "ugly"], [None, None, None]])
def test_prompts_as_the_pipelines_encode_them(agrees, stacks, pipelines, kind, negatives):
    reference = pipelines(kind)
    expected = reference.encode_prompt(
        prompt=PROMPTS,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=None if negatives[0] is None else negatives,
    )
    positive, negative = encode_prompts(stacks(kind), PROMPTS, negatives, TextOptions(rule="none"))
    torch.testing.assert_close(positive.tokens, expected[0], **TIGHT)
    torch.testing.assert_close(negative.tokens, expected[1], **TIGHT)
    name = f"diffusers {type(reference).__name__}"
    agrees("text conditioning", kind, positive.tokens, expected[0], CLOSE, name)
    if kind.startswith("sdxl"):
        agrees("pooled text", kind, positive.pooled, expected[2], CLOSE, name)
        torch.testing.assert_close(positive.pooled, expected[2], **TIGHT)
        torch.testing.assert_close(negative.pooled, expected[3], **TIGHT)
        assert positive.pooled.shape == (3, 40)
    else:
        assert positive.pooled is None and negative.pooled is None
    assert (negative.tokens.abs().max() == 0) == (kind == "sdxl" and negatives[0] is None)


@pytest.mark.parametrize("theirs_skip", [1, 2, 3])
def test_clip_skip_against_the_pipeline_of_sdxl(stacks, pipelines, theirs_skip):
    expected = pipelines("sdxl").encode_prompt(
        prompt=PROMPTS, device="cpu", do_classifier_free_guidance=False, clip_skip=theirs_skip
    )
    options = TextOptions(rule="none", clip_skip=theirs_skip + 2)
    positive, none = encode_prompts(stacks("sdxl"), PROMPTS, options=options)
    assert none is None
    torch.testing.assert_close(positive.tokens, expected[0], **TIGHT)
    torch.testing.assert_close(positive.pooled, expected[2], **TIGHT)


@pytest.mark.parametrize("theirs_skip", [0, 1, 2])
def test_clip_skip_of_sd1_is_the_earlier_layer_with_the_final_norm(stacks, theirs, tokenizers, theirs_skip):
    model = theirs(SMALL_L)
    ids = tokenizers[None](PROMPTS, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    hidden = model(ids, output_hidden_states=True).hidden_states[-(theirs_skip + 1)]
    options = TextOptions(rule="none", clip_skip=theirs_skip + 1)
    positive, _ = encode_prompts(stacks("sd1"), PROMPTS, options=options)
    torch.testing.assert_close(positive.tokens, model.final_layer_norm(hidden), **TIGHT)


def test_a_long_prompt_is_its_windows_side_by_side(stacks):
    stack = stacks("sdxl")
    parts = ["cat " * 75, "dog " * 75, "a bird"]
    options = TextOptions(rule="none")
    whole, negative = encode_prompts(stack, ["".join(parts)], ["bad"], options)
    each, _ = encode_prompts(stack, parts, options=options)
    assert whole.tokens.shape == negative.tokens.shape == (1, 3 * LENGTH, 80)
    torch.testing.assert_close(whole.tokens[0], each.tokens.flatten(0, 1), **TIGHT)
    torch.testing.assert_close(whole.pooled[0], each.pooled[0], **TIGHT)
    few, _ = encode_prompts(stack, ["bad", ""], options=options)
    torch.testing.assert_close(negative.tokens[0], few.tokens[[0, 1, 1]].flatten(0, 1), **TIGHT)
    torch.testing.assert_close(negative.pooled, few.pooled[:1], **TIGHT)


def test_no_prompt_changes_another_of_one_length(stacks):
    prompts = ["(cat:1.4)", "[dog]", "(a bird) BREAK (fish:0.3)"]
    for weighting in ("a1111", "comfy", "compel"):
        options = TextOptions(weighting=weighting)
        for alone in (prompts[:1], prompts[2:]):
            one, _ = encode_prompts(stacks("sdxl"), alone, [None], options)
            many, _ = encode_prompts(stacks("sdxl"), [*alone, prompts[1]], ["bad", None], options)
            torch.testing.assert_close(many.tokens[:1], one.tokens, **TIGHT)


def test_weights_of_one_change_nothing(stacks):
    for kind in KINDS:
        plain, _ = encode_prompts(stacks(kind), ["a (cat:1) dog"], options=TextOptions(rule="a1111"))
        for weighting in ("a1111_no_norm", "comfy", "compel", "none"):
            same, _ = encode_prompts(
                stacks(kind), ["a (cat:1.0) dog"], options=TextOptions(weighting=weighting)
            )
            assert torch.equal(same.tokens, plain.tokens)


def test_a_weight_changes_its_tokens_as_its_rule_says(stacks, theirs, tokenizers):
    """Composed here from the reference's features, for one prompt of SD 1."""
    model, tokenizer = theirs(SMALL_L), tokenizers[None]

    def features(text, mask=None):
        row = tokenizer(text, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        return model(row, attention_mask=mask).last_hidden_state[0]

    z, empty = features("a cat dog"), features("")
    weights = torch.ones(LENGTH, 1)
    weights[2], weights[3] = 1.4, 0.5

    def ours(prompt, rule):
        return encode_prompts(stacks("sd1"), [prompt], options=TextOptions(rule=rule))[0].tokens[0]

    expected = z * weights * (z.mean() / (z * weights).mean())
    torch.testing.assert_close(ours("a (cat:1.4) (dog:0.5)", "a1111"), expected, **TIGHT)
    torch.testing.assert_close(ours("a (cat:1.4) (dog:0.5)", "comfy"), empty + (z - empty) * weights, **TIGHT)

    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, 3] = 0
    without = features("a cat dog", mask)
    parts = [empty + (part - empty) * weights for part in (z, without)]
    torch.testing.assert_close(ours("a (cat)1.4 (dog)0.5", "compel"), sum(parts) / 2, **TIGHT)


def test_pooled_is_not_weighted(stacks):
    plain, _ = encode_prompts(stacks("sdxl"), ["a cat dog"])
    for rule, prompt in (
        ("a1111", "a (cat:1.5) dog"),
        ("comfy", "a (cat:1.5) dog"),
        ("compel", "a (cat)0.5 dog"),
    ):
        weighed, _ = encode_prompts(stacks("sdxl"), [prompt], options=TextOptions(rule=rule))
        torch.testing.assert_close(weighed.pooled, plain.pooled, **TIGHT)
        assert (weighed.tokens - plain.tokens).abs().max() > 1e-3


# --- textual inversion -------------------------------------------------------------------------------------------


def learnt(tmp_path, tensors, name="style"):
    save_file(tensors, tmp_path / f"{name}.safetensors")
    return read_inversion(tmp_path / f"{name}.safetensors")


def test_inversions_as_tokens_that_the_vocabulary_learnt(tmp_path, stacks, theirs, tokenizers):
    """The oracle is the reference's model with its table of embeddings grown by the vectors, as diffusers does it."""
    draw = torch.Generator().manual_seed(3)
    vectors = torch.randn(3, SMALL_L.width, generator=draw) * 0.02
    stack = replace(stacks("sd1"), inversions=(learnt(tmp_path, {"emb_params": vectors}),))
    positive, _ = encode_prompts(stack, ["a style cat", "style, style"])

    config = replace(SMALL_L, vocabulary=49_411)
    state = dict(theirs(SMALL_L).state_dict())
    table = "embeddings.token_embedding.weight"
    state[table] = torch.cat([state[table], vectors])
    from transformers import CLIPTextModel

    grown = CLIPTextModel(
        type(theirs(SMALL_L).config)(**theirs(SMALL_L).config.to_dict() | {"vocab_size": config.vocabulary})
    )
    grown.eval().load_state_dict(state)
    new, eos = [49_408, 49_409, 49_410], 49_407
    rows = [[49_406, 320, *new, 2368], [49_406, *new, 267, *new]]
    ids = torch.tensor([row + [eos] * (LENGTH - len(row)) for row in rows])
    torch.testing.assert_close(positive.tokens, grown(ids).last_hidden_state, **TIGHT)


def test_inversions_of_two_encoders_reach_both(tmp_path, stacks):
    found = learnt(tmp_path, {"clip_l": torch.ones(2, 32), "clip_g": -torch.ones(2, 48)})
    plain = stacks("sdxl")
    stack = replace(plain, inversions=(found,))
    with_it, _ = encode_prompts(stack, ["a style"])
    same, _ = encode_prompts(stack, ["a cat"])
    other, _ = encode_prompts(plain, ["a style"])
    assert torch.equal(same.tokens, encode_prompts(plain, ["a cat"])[0].tokens)
    for channels in (slice(0, 32), slice(32, 80)):
        assert (with_it.tokens - other.tokens)[..., channels].abs().max() > 1e-2
    assert (with_it.pooled - other.pooled).abs().max() > 1e-3
    refiner = replace(stacks("sdxl-refiner"), inversions=(found,))
    torch.testing.assert_close(encode_prompts(refiner, ["a style"])[0].pooled, with_it.pooled, **TIGHT)


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("sd1", {"emb_params": (1, 1024)}, "width 1024, those of Stable Diffusion 2; Stable Diffusion 1 reads"),
        ("sd2", {"emb_params": (1, 768)}, "width 768, those of Stable Diffusion 1; Stable Diffusion 2 reads"),
        ("sd1", {"clip_l": (1, 768), "clip_g": (1, 1280)}, "those of Stable Diffusion XL; Stable Diffusion 1 reads"),
        ("sdxl", {"emb_params": (1, 768)}, "those of Stable Diffusion 1; Stable Diffusion XL reads width 768 and 1280"),
        ("sdxl", {"clip_l": (1, 768)}, "clip_l of width 768"),
        ("sdxl-refiner", {"clip_l": (1, 768)}, "refiner reads width 1280"),
        ("sd1", {"emb_params": (1, 7)}, "one encoder of width 7; Stable"),
    ],
)  # fmt: skip
def test_an_inversion_of_another_family_is_refused_by_name(tmp_path, kind, shape, message):
    with torch.device("meta"):
        encoders = tuple(ClipTextEncoder(replace(reader.config, layers=1)) for reader in PLANS[kind].readers)
    found = learnt(tmp_path, {key: torch.ones(size) for key, size in shape.items()})
    with pytest.raises(CheckpointError, match=f"'style' holds vectors for .*{message}"):
        TextStack(PLANS[kind], encoders, inversions=(found,))


# --- sizes -------------------------------------------------------------------------------------------------------


def test_size_features(agrees, theirs):
    from diffusers.models.embeddings import Timesteps

    numbers = size_numbers((1024, 768), (0, 16), (1536, 1023))
    assert numbers == (1024, 768, 0, 16, 1536, 1023) and size_numbers((8, 9)) == (8, 9, 0, 0, 8, 9)
    pooled = torch.randn(2, 40)
    features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor(numbers)).reshape(
        1, -1
    )
    expected = torch.cat([pooled, features.expand(2, -1)], dim=-1)
    torch.testing.assert_close(size_vector(pooled, numbers), expected, **TIGHT)
    agrees("sizes and crops", "sdxl", size_vector(pooled, numbers), expected, CLOSE, "diffusers Timesteps")
    assert size_vector(pooled, score_numbers((8, 9), (1, 2), NEGATIVE_AESTHETIC)).shape == (2, 40 + 5 * 256)
    assert score_numbers((8, 9), (1, 2)) == (8, 9, 1, 2, 6.0)
    exact = size_vector(pooled.bfloat16(), numbers)
    assert exact.dtype == torch.float32 and torch.equal(exact[:, 40:], size_vector(pooled, numbers)[:, 40:])
    for wrong in ((1024, float("nan")), (1024, "8"), (True, 8)):
        with pytest.raises(InputError, match="finite numbers"):
            size_numbers(wrong)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_requests_that_do_not_fit_are_refused(stacks):
    stack = stacks("sd1")
    with pytest.raises(InputError, match="at least one prompt"):
        encode_prompts(stack, [])
    with pytest.raises(InputError, match="2 prompts need as many negatives, not 1"):
        encode_prompts(stack, ["a", "b"], ["c"])
    with pytest.raises(InputError, match='"word" is unknown'):
        TextOptions(weighting="word")
    with pytest.raises(InputError, match='"a2222" are unknown'):
        TextOptions(rule="a2222")
    with pytest.raises(InputError, match="2 text encoders"):
        TextStack(PLANS["sdxl"], stack.encoders)
    with pytest.raises(InputError, match='weighting "x" is unknown'):
        encode_windows(stack.encoders[0], bundled(), [[empty_window(bundled())]], weighting="x")
    with pytest.raises(InputError, match="one number of windows"):
        encode_windows(stack.encoders[0], bundled(), [[empty_window(bundled())], []])
    small = ClipTextEncoder(replace(SMALL_L, layers=1, vocabulary=100))
    with pytest.raises(CheckpointError, match=r"49408 ids .* the encoder reads 100 ids"):
        TextStack(PLANS["sd1"], (small,))
    for change in ({"heads": 5}, {"layers": 0}, {"activation": "relu"}, {"width": 3.0}, {"projection": -1}):
        with pytest.raises(InputError):
            replace(SMALL_L, **change)


def test_an_inversion_is_compared_as_the_object_it_is():
    one = Inversion("a", ("a",), torch.ones(1, 4))
    assert one == one and one != Inversion("a", ("a",), torch.ones(1, 4)) and len({one, one}) == 1
