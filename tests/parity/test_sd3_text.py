"""Stable Diffusion 3's text against transformers' encoders and diffusers' pipeline, from random weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from sfumato.families.published.condition import TextOptions
from sfumato.families.sd3.condition import READERS, TextStack, encode_prompts
from sfumato.families.sd3.text import text_openers, tokenizers_of
from sfumato.storage import save_tensors
from sfumato.text.clip_tokens import bundled, save_folder
from sfumato.text.inversion import read_inversion
from small_sd3 import CONFIGS, DEEP, PARTS, SHAPE, named, one_by_one, t5_tokenizer, theirs

CPU = torch.device("cpu")
CLOSE = 1e-5  # ‖ours − theirs‖ / ‖theirs‖
THEIRS, T5 = "diffusers StableDiffusion3Pipeline", "transformers T5EncoderModel"
PROMPT, NEGATIVE = "a red metal sphere behind the small blue cube, 4k photo", "blurry low quality"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def encoders():
    return theirs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder's tokenizers."""
    place = tmp_path_factory.mktemp("sd3")
    save_folder(bundled(None), place / "tokenizer")
    save_folder(bundled(0), place / "tokenizer_2")
    t5_tokenizer(place / "tokenizer_3")
    return place


@pytest.fixture(scope="module")
def pipeline(encoders, folder):
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=SHAPE.joint, caption_projection_dim=16, pooled_projection_dim=sum(SHAPE.pooled),
        out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(),
        AutoencoderKL(latent_channels=4),
        encoders["text_encoder"],
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        encoders["text_encoder_2"],
        CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        encoders["text_encoder_3"],
        PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer_3" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
        ),
    )


def stack(encoders, folder, readers=READERS, **options) -> TextStack:
    parts = {part: named(part, network.state_dict()) for part, network in encoders.items()}
    opened = text_openers(
        readers, CONFIGS, parts, dict(zip(PARTS, PARTS, strict=True)), torch.float32, CPU, **options
    )
    tokenizers = tokenizers_of(readers, folder, "the model", vocabulary=DEEP.vocabulary)
    return TextStack(_Asked(opened), tokenizers, SHAPE)


class _Asked(dict):
    """Encoders, each opened anew whenever it is asked for."""

    def __getitem__(self, part):
        return super().__getitem__(part)()


@pytest.mark.parametrize("length", (256, 77))
@pytest.mark.parametrize("skip", (None, 1))
def test_conditioning_is_that_of_the_pipeline(encoders, folder, pipeline, agrees, length, skip):
    want = pipeline.encode_prompt(
        PROMPT, None, None, negative_prompt=NEGATIVE, max_sequence_length=length, clip_skip=skip
    )
    if skip is not None:  # theirs skips no layer of the negative, ours as many as of the prompt
        of_negative = pipeline.encode_prompt(
            NEGATIVE,
            None,
            None,
            max_sequence_length=length,
            clip_skip=skip,
            do_classifier_free_guidance=False,
        )
        want = want[0], of_negative[0], want[2], of_negative[2]
    options = TextOptions(rule="none", length=length, clip_skip=None if skip is None else skip + 2)
    ours, negative = encode_prompts(stack(encoders, folder), [PROMPT], [NEGATIVE], options)
    assert ours.tokens.shape == (1, 77 + length, SHAPE.joint)
    for what, mine, other in (
        ("tokens", ours.tokens, want[0]),
        ("tokens of the negative", negative.tokens, want[1]),
        ("pooled embedding", ours.pooled, want[2]),
        ("pooled embedding of the negative", negative.pooled, want[3]),
    ):
        agrees(f"SD3's text, {what}", f"T5 of {length} tokens", mine, other, CLOSE, THEIRS)


def test_t5_alone_is_that_of_transformers(encoders, folder, agrees):
    encoder = stack(encoders, folder).encoders["text_encoder_3"]
    torch.manual_seed(1)
    ids = torch.randint(0, 300, (2, 400))  # beyond the distance from which all are alike
    agrees("T5's encoder", "3 blocks", encoder(ids), encoders["text_encoder_3"](ids)[0], CLOSE, T5)
    visible = torch.rand(2, 400) < 0.7
    masked = encoders["text_encoder_3"](ids, attention_mask=visible.long())[0]
    agrees("T5's encoder", "3 blocks, some tokens hidden", encoder(ids, visible), masked, CLOSE, T5)


@pytest.mark.parametrize("length", (256, 77))
def test_without_t5_it_is_still_that_of_the_pipeline(encoders, folder, pipeline, agrees, length):
    kept, pipeline.text_encoder_3 = pipeline.text_encoder_3, None
    try:
        want = pipeline.encode_prompt(PROMPT, None, None, negative_prompt=None, max_sequence_length=length)
    finally:
        pipeline.text_encoder_3 = kept
    ours, negative = encode_prompts(
        stack(encoders, folder, READERS[:2]), [PROMPT], [None], TextOptions(rule="none", length=length)
    )
    agrees("SD3's text, tokens", "without T5", one_by_one(ours), want[0], CLOSE, THEIRS)
    agrees("SD3's text, tokens", "without T5, no negative", one_by_one(negative), want[1], CLOSE, THEIRS)
    agrees("SD3's text, pooled embedding", "without T5", ours.pooled, want[2], CLOSE, THEIRS)


def test_a_batch_is_its_prompts(encoders, folder, pipeline, agrees):
    prompts, unwanted = [PROMPT, "an old house"], [NEGATIVE, ""]
    want = pipeline.encode_prompt(prompts, None, None, negative_prompt=unwanted)
    ours, negative = encode_prompts(stack(encoders, folder), prompts, unwanted, TextOptions(rule="none"))
    agrees("SD3's text, tokens", "two prompts", ours.tokens, want[0], CLOSE, THEIRS)
    agrees("SD3's text, tokens", "two negatives", negative.tokens, want[1], CLOSE, THEIRS)


def test_inversions_as_tokens_that_both_vocabularies_learnt(encoders, folder, pipeline, agrees, tmp_path):
    """The oracle is the pipeline whose CLIPs have their tables grown by the vectors, as diffusers does it for SDXL."""
    draw = torch.Generator().manual_seed(3)
    vectors = {
        "clip_l": torch.randn(2, 32, generator=draw) * 0.02,
        "clip_g": torch.randn(2, 48, generator=draw) * 0.02,
    }
    save_tensors(tmp_path / "style.safetensors", vectors)
    inversions = (read_inversion(tmp_path / "style.safetensors"),)
    grown = copy.copy(pipeline)
    for rows, part in zip(vectors.values(), ("text_encoder", "text_encoder_2"), strict=True):
        encoder = copy.deepcopy(encoders[part])
        place = folder / part.replace("text_encoder", "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(place)
        tokenizer.add_tokens(["<one>", "<two>"])
        encoder.resize_token_embeddings(len(tokenizer))
        encoder.get_input_embeddings().weight.data[-2:] = rows
        setattr(grown, part, encoder)
        setattr(grown, place.name, tokenizer)
    grown.text_encoder_3 = None
    want = grown.encode_prompt("a <one> <two> cat", None, None, do_classifier_free_guidance=False)
    plain = stack(encoders, folder, READERS[:2])
    learnt = replace(plain, inversions=inversions)
    options = TextOptions(rule="none")
    ours, _ = encode_prompts(learnt, ["a style cat"], options=options)
    agrees("SD3's text, tokens", "a learnt word, without T5", one_by_one(ours), want[0], CLOSE, THEIRS)
    agrees("SD3's text, pooled embedding", "a learnt word, without T5", ours.pooled, want[2], CLOSE, THEIRS)
    assert not torch.equal(ours.tokens, encode_prompts(plain, ["a style cat"], options=options)[0].tokens)
    # T5 reads the word as it is written
    whole = stack(encoders, folder)
    with_it, without = (
        encode_prompts(each, ["a style cat"], options=options)[0].tokens
        for each in (replace(whole, inversions=inversions), whole)
    )
    assert torch.equal(with_it[:, 77:], without[:, 77:]) and torch.equal(with_it[:, :77], ours.tokens[:, :77])
