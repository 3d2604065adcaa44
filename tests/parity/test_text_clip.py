"""Tokens and text encoders against transformers' CLIP, from random weights. The vocabulary is the real one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_reference import CLOSE, PROMPTS, SMALL_G, SMALL_H, SMALL_L, TIGHT, opened
from sfumato.errors import CheckpointError, InputError
from sfumato.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, ClipConfig, ClipTextEncoder
from sfumato.text.clip_tokens import bundled
from sfumato.text.syntax import parse
from sfumato.text.windows import LENGTH, empty_window, lay_out


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


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
    expected = opened(config, state)(ids)[0]
    for layout in (bare, named, old):
        encoder = opened(config, layout)
        assert set(encoder.state_dict()) == set(named)
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        assert torch.equal(encoder(ids)[0], expected)


def test_weights_are_copied_and_may_be_cast(theirs):
    state = theirs(SMALL_L).state_dict()
    key = "embeddings.token_embedding.weight"
    encoder = opened(SMALL_L, state)
    table = encoder.text_model.embeddings.token_embedding.weight
    assert torch.equal(table, state[key]) and table.data_ptr() != state[key].data_ptr()
    half = opened(SMALL_L, state, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = torch.tensor([empty_window(bundled()).ids])
    assert half(ids)[0].dtype == torch.bfloat16
    assert (half(ids)[0] - encoder(ids)[0]).norm() < 0.05 * encoder(ids)[0].norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("final_layer_norm.bias"), r"1 missing: (text_model\.)?final_layer_norm.bias"),
        (lambda s: s.update(x=s["final_layer_norm.bias"]), "1 unexpected: x"),
        (lambda s: s.update({"final_layer_norm.bias": torch.ones(3)}), r"shape \(3,\), expected \(32,\)"),
        (lambda s: s.update({"final_layer_norm.bias": torch.ones(32, dtype=torch.bool)}), "holds torch.bool"),
        (
            lambda s: s.update({"final_layer_norm.bias": torch.full((32,), torch.nan)}),
            "final_layer_norm.bias holds NaN",
        ),
        (lambda s: s.update({"text_model.final_layer_norm.bias": torch.ones(32)}), "given twice"),
        (lambda s: s.clear(), r"missing: .* and \d+ more"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(theirs, change, message):
    state = dict(theirs(SMALL_L).state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=f"^first part.*{message}") as caught:
        opened(SMALL_L, state, name="first part")
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
