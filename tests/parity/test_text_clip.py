"""Text conditioning against transformers' CLIP and the pipelines of diffusers, from random weights.

Encoders are tiny; the vocabulary is the real one. Where the oracle cannot be asked (its `clip_skip` for SD 1 and 2
fails with transformers 5.6 and later), its own hidden states and norm are composed here.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sfumato.errors import CheckpointError, InputError
from sfumato.families.sd.condition import (
    NEGATIVE_AESTHETIC,
    PLANS,
    TextOptions,
    TextStack,
    encode_prompts,
    score_numbers,
    size_numbers,
    size_vector,
)
from sfumato.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, ClipConfig, ClipTextEncoder, load_encoder
from sfumato.text.clip_tokens import MERGES, bundled
from sfumato.text.inversion import Inversion, read_inversion
from sfumato.text.syntax import parse
from sfumato.text.weighting import encode_windows
from sfumato.text.windows import LENGTH, empty_window, lay_out

SMALL_L = ClipConfig(32, 5, 4, "quick_gelu", inner=37)
SMALL_H = ClipConfig(32, 4, 4, "gelu")
SMALL_G = ClipConfig(48, 6, 3, "gelu", projection=40)
PROMPTS = ["a photo of a cat", "An astronaut, riding a (green) horse: 4k", ""]
TIGHT = {"atol": 1e-5, "rtol": 1e-5}
CLOSE = 1e-5  # ‖ours − theirs‖ / ‖theirs‖


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def theirs():
    """config → transformers' encoder of random weights, whose norms and biases matter too."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    made = {}

    def make(config: ClipConfig):
        if config not in made:
            torch.manual_seed(len(made))
            made[config] = (CLIPTextModelWithProjection if config.projection else CLIPTextModel)(
                CLIPTextConfig(
                    hidden_size=config.width,
                    num_hidden_layers=config.layers,
                    num_attention_heads=config.heads,
                    intermediate_size=config.inner or 4 * config.width,
                    hidden_act=config.activation,
                    projection_dim=config.projection or 32,
                    vocab_size=config.vocabulary,
                )
            ).eval()
            for name, weight in made[config].named_parameters():
                if not name.endswith("embedding.weight"):
                    weight.data.normal_(std=0.2 if weight.ndim > 1 else 0.1).add_("norm.weight" in name)
        return made[config]

    return make


@pytest.fixture(scope="module")
def ours(theirs):
    return lambda config: load_encoder(config, theirs(config).state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer's folder as published ones have it. The ids are worked out here from the merges' file."""
    merges = MERGES.read_text(encoding="utf-8").split("\n")[1:-1]
    printable = [chr(b) for r in (range(33, 127), range(161, 173), range(174, 256)) for b in r]
    letters = printable + [chr(256 + n) for n in range(256 - len(printable))]
    pieces = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    place = tmp_path_factory.mktemp("tokenizer")
    (place / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}), encoding="utf-8")
    (place / "merges.txt").write_text(MERGES.read_text(encoding="utf-8"), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def tokenizers(folder):
    """transformers' tokenizers that pad with the end mark, and with id 0."""
    from transformers import CLIPTokenizer

    return {
        pad: CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH, pad_token=mark)
        for pad, mark in ((None, "<|endoftext|>"), (0, "!"))
    }


# --- tokens ------------------------------------------------------------------------------------------------------

HARD = [
    *PROMPTS,
    "a photo of an astronaut riding a horse",
    "ÜBER Straße ﬁ ① Ⅳ ǅ İstanbul ΣΊΣΥΦΟΣ",
    "👩‍👩‍👧 🏳️‍🌈 漢字 かな 한국어 العربية עברית हिन्दी",
    "don't it's WE'RE they'll I'd 've 's' ''s",
    "semi-realistic, 8k,,, !!!??? ... #1 <lora:x:1> (a:1.2) [b] {c} \\ | ~",
    "tab\tnew\nline\u00a0nbsp\u3000wide\u200bzero\u0085next",
    "e\u0301\u0301 \ufeff \x00 \x01 \u202e",
    "<|startoftext|> <|endoftext|> a<|endoftext|>b <|ENDOFTEXT|> <|end",
    "antidisestablishmentarianism" * 20,
    "1234567890 3.14 1,000 ½ ²",
    "word " * 300,
]


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_tokens(tokenizers, text):
    assert bundled().encode(text) == tokenizers[None](text, add_special_tokens=False).input_ids


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=60))
def test_tokens_of_any_text(tokenizers, text):
    assert bundled().encode(text) == tokenizers[None](text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("pad", [None, 0])
def test_a_window_is_the_padded_row_of_the_reference(tokenizers, pad):
    for text in ("a photo of a cat", "", "cat " * 75):
        row = tokenizers[pad](text, padding="max_length", max_length=LENGTH, truncation=True).input_ids
        assert lay_out(parse(text, "none"), bundled(pad))[0].ids == tuple(row)


def test_an_exclamation_mark_is_not_padding(tokenizers):
    """Where id 0 pads, transformers takes every `!` for padding and gives id 0; the encoders learnt 256 for it."""
    assert tokenizers[0]("cat!", add_special_tokens=False).input_ids == [2368, 0]
    assert tokenizers[None]("cat!", add_special_tokens=False).input_ids == [2368, 256]
    assert bundled(0).encode("cat!") == [2368, 256]


# --- the transformer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "count"), [(CLIP_L, 123_060_480), (OPENCLIP_H, 340_387_840), (OPENCLIP_BIGG, 694_659_840)]
)
def test_the_published_encoders_have_their_known_size(config, count):
    with torch.device("meta"):
        encoder = ClipTextEncoder(config)
    assert sum(p.numel() for p in encoder.parameters()) == count
    names = set(encoder.state_dict())
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert ("text_projection.weight" in names) == bool(config.projection)


@pytest.mark.parametrize("config", [SMALL_L, SMALL_H, SMALL_G], ids=["l", "h", "g"])
def test_hidden_states_and_pooled(agrees, theirs, ours, config):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 49_406, (3, LENGTH), generator=draw)
    ids[:, 0], ids[0, 9:], ids[1, 30], ids[1, 31:], ids[2, -1] = 49_406, 49_407, 49_407, 0, 49_407
    model, encoder = theirs(config), ours(config)
    expected = model(ids, output_hidden_states=True)
    core = getattr(model, "text_model", model)
    for skip in range(1, config.layers + 1):
        hidden = expected.hidden_states[-skip]
        raw, pooled = encoder(ids, clip_skip=skip, final_norm=False)
        torch.testing.assert_close(raw, hidden, **TIGHT)
        torch.testing.assert_close(encoder(ids, clip_skip=skip)[0], core.final_layer_norm(hidden), **TIGHT)
        if config.projection:
            torch.testing.assert_close(pooled, expected.text_embeds, **TIGHT)
        else:
            assert pooled is None
    torch.testing.assert_close(encoder(ids)[0], expected.last_hidden_state, **TIGHT)
    shape, name = f"{config.layers} layers of {config.width}", f"transformers {type(model).__name__}"
    agrees("text encoder", shape, encoder(ids)[0], expected.last_hidden_state, CLOSE, name)
    for skip in (0, config.layers + 1):
        with pytest.raises(InputError, match=f"from 1, the last layer, to {config.layers}"):
            encoder(ids, clip_skip=skip)


def test_places_no_token_may_look_at(theirs, ours):
    ids = torch.tensor([lay_out(parse(text), bundled())[0].ids for text in PROMPTS])
    visible = torch.ones_like(ids, dtype=torch.bool)
    visible[0, 2:5] = False
    visible[1, 4] = False
    expected = theirs(SMALL_L)(ids, attention_mask=visible.long()).last_hidden_state
    torch.testing.assert_close(ours(SMALL_L)(ids, visible=visible)[0], expected, **TIGHT)


@pytest.mark.parametrize("config", [SMALL_L, SMALL_G], ids=["l", "g"])
def test_both_layouts_of_names_load(theirs, config):
    state = theirs(config).state_dict()
    bare = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    named = {n if n == "text_projection.weight" else f"text_model.{n}": t for n, t in bare.items()}
    old = named | {
        "text_model.embeddings.position_ids": torch.arange(LENGTH)[None],
        "logit_scale": torch.ones(()),
    }
    if not config.projection:
        old["text_projection.weight"] = torch.ones(3, 3)
    ids = torch.tensor([empty_window(bundled()).ids])
    expected = load_encoder(config, state)(ids)[0]
    for layout in (bare, named, old):
        encoder = load_encoder(config, layout)
        assert set(encoder.state_dict()) == set(named)
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        assert torch.equal(encoder(ids)[0], expected)


def test_weights_are_taken_as_they_are_or_in_a_given_type(theirs):
    state = theirs(SMALL_L).state_dict()
    key = "embeddings.token_embedding.weight"
    encoder = load_encoder(SMALL_L, state)
    assert encoder.text_model.embeddings.token_embedding.weight.data_ptr() == state[key].data_ptr()
    half = load_encoder(SMALL_L, state, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    mixed = {n: t.half() if n == key else t for n, t in state.items()}
    assert {p.dtype for p in load_encoder(SMALL_L, mixed).parameters()} == {torch.float16}
    ids = torch.tensor([empty_window(bundled()).ids])
    assert half(ids)[0].dtype == torch.bfloat16
    assert (half(ids)[0] - encoder(ids)[0]).norm() < 0.05 * encoder(ids)[0].norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("final_layer_norm.bias"), "the first part lacks text_model.final_layer_norm.bias"),
        (lambda s: s.update(x=s["final_layer_norm.bias"]), "holds unexpected text_model.x"),
        (
            lambda s: s.update({"final_layer_norm.bias": torch.ones(3)}),
            r"of shape \(3,\); \(32,\) is expected",
        ),
        (lambda s: s.update({"text_model.final_layer_norm.bias": torch.ones(32)}), "twice"),
        (lambda s: s.clear(), r"lacks .* and \d+ more"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(theirs, change, message):
    state = dict(theirs(SMALL_L).state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_encoder(SMALL_L, state, name="first part")
    assert "\n" not in str(caught.value)


def test_a_config_from_a_folder(theirs):
    for config in (SMALL_L, SMALL_G):
        values = json.loads(theirs(config).config.to_json_string(use_diff=False))
        values["architectures"] = [type(theirs(config)).__name__]
        assert ClipConfig.from_json(values) == replace(config, inner=config.inner or 4 * config.width)
    for wrong in (
        {},
        values | {"max_position_embeddings": 248},
        values | {"hidden_act": "relu"},
        values | {"hidden_size": "x"},
    ):
        with pytest.raises(CheckpointError, match="config"):
            ClipConfig.from_json(wrong)


# --- whole conditioning ------------------------------------------------------------------------------------------


def pipeline(kind: str, encoders, tokenizers):
    """diffusers' pipeline with nothing but what reads text."""
    import diffusers

    noise = diffusers.DDIMScheduler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in ("sd1", "sd2"):
            return diffusers.StableDiffusionPipeline(
                vae=None, text_encoder=encoders[0], tokenizer=tokenizers[0], unet=None, scheduler=noise,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
        first = (None, None) if len(encoders) == 1 else (encoders[0], tokenizers[0])
        return diffusers.StableDiffusionXLPipeline(
            vae=None, text_encoder=first[0], text_encoder_2=encoders[-1], tokenizer=first[1],
            tokenizer_2=tokenizers[-1], unet=None, scheduler=noise, force_zeros_for_empty_prompt=kind == "sdxl",
            add_watermarker=False,
        )  # fmt: skip


KINDS = {"sd1": [SMALL_L], "sd2": [SMALL_H], "sdxl": [SMALL_L, SMALL_G], "sdxl-refiner": [SMALL_G]}


@pytest.fixture(scope="module")
def stacks(ours):
    return lambda kind: TextStack(PLANS[kind], tuple(ours(config) for config in KINDS[kind]))


@pytest.fixture(scope="module")
def pipelines(theirs, tokenizers):
    return lambda kind: pipeline(
        kind, [theirs(c) for c in KINDS[kind]], [tokenizers[reader.pad] for reader in PLANS[kind].readers]
    )


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
    with pytest.raises(InputError, match="'word' is unknown"):
        TextOptions(weighting="word")
    with pytest.raises(InputError, match="'a2222' are unknown"):
        TextOptions(rule="a2222")
    with pytest.raises(InputError, match="2 text encoders"):
        TextStack(PLANS["sdxl"], stack.encoders)
    with pytest.raises(InputError, match="weighting 'x' is unknown"):
        encode_windows(stack.encoders[0], bundled(), [[empty_window(bundled())]], weighting="x")
    with pytest.raises(InputError, match="one number of windows"):
        encode_windows(stack.encoders[0], bundled(), [[empty_window(bundled())], []])
    small = load_encoder(
        replace(SMALL_L, layers=1, vocabulary=100),
        {
            n: torch.zeros(p.shape)
            for n, p in ClipTextEncoder(replace(SMALL_L, layers=1, vocabulary=100)).state_dict().items()
        },
    )
    with pytest.raises(CheckpointError, match=r"49408 ids .* the encoder reads 100 ids"):
        TextStack(PLANS["sd1"], (small,))
    for change in ({"heads": 5}, {"layers": 0}, {"activation": "relu"}, {"width": 3.0}, {"projection": -1}):
        with pytest.raises(InputError):
            replace(SMALL_L, **change)


def test_an_inversion_is_compared_as_the_object_it_is():
    one = Inversion("a", ("a",), torch.ones(1, 4))
    assert one == one and one != Inversion("a", ("a",), torch.ones(1, 4)) and len({one, one}) == 1
