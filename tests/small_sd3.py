"""Stable Diffusion 3 small, with random weights: its text encoders, T5's tokens for a few words, and whole folders."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from helpers import spread
from sfumato.autoencoder.kl import AutoencoderKL
from sfumato.checkpoint.rules import View
from sfumato.families.published import folder as published
from sfumato.families.published.condition import TextFeatures
from sfumato.families.published.keys import text_folder_map
from sfumato.families.published.kinds import TextPart
from sfumato.families.sd3 import folder
from sfumato.families.sd3.condition import READERS, TextShape
from sfumato.families.sd3.shapes import SYSTEMS, System
from sfumato.nn.mmdit import MMDiT, MMDiTConfig
from sfumato.storage import save_tensors, write_json
from sfumato.text.clip import PROJECTION, ClipConfig
from sfumato.text.clip_tokens import bundled, save_folder
from sfumato.text.t5 import T5Config
from sfumato.types import Conditioning

WORDS = (
    "a red metal sphere behind the small blue cube in front of an old house, three green cats on one table. "
    "photo painting sketch of dogs running near water at night! bright blurry low quality text, 4k sharp (detailed) "
)
NARROW = ClipConfig(32, 3, 2, "quick_gelu", projection=32)
WIDE = ClipConfig(48, 3, 3, "gelu", projection=40)
DEEP = T5Config(width=96, inner=160, layers=3, heads=4, head_width=16, vocabulary=384)
CONFIGS = {"text_encoder": NARROW, "text_encoder_2": WIDE, "text_encoder_3": DEEP}
SHAPE = TextShape(clip=(32, 48), pooled=(32, 40), joint=96)
PARTS = tuple(reader.part for reader in READERS)


@functools.cache
def t5_json() -> str:
    """A tokenizer.json with T5's rules and marks, trained on a few words."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 4 + WORDS.split(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer.to_str()


def t5_tokenizer(place: Path) -> Path:
    """The file in a folder, which is made."""
    place.mkdir(parents=True, exist_ok=True)
    path = place / "tokenizer.json"
    path.write_text(t5_json(), encoding="utf-8")
    return path


def theirs(seed: int = 3) -> dict[str, torch.nn.Module]:
    """transformers' encoders, in float32."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel
    from transformers import T5Config as TheirConfig

    torch.manual_seed(seed)
    made: dict[str, torch.nn.Module] = {}
    for part, config in CONFIGS.items():
        if isinstance(config, T5Config):
            made[part] = T5EncoderModel(
                TheirConfig(
                    d_model=config.width, d_ff=config.inner, num_layers=config.layers, num_heads=config.heads,
                    d_kv=config.head_width, vocab_size=config.vocabulary, feed_forward_proj="gated-gelu",
                )
            )  # fmt: skip
        else:
            made[part] = CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
                    intermediate_size=4 * config.width, hidden_act=config.activation, vocab_size=config.vocabulary,
                    projection_dim=config.projection, eos_token_id=49_407, bos_token_id=49_406,
                )
            )  # fmt: skip
        for name, weight in made[part].named_parameters():
            if weight.ndim == 1:
                weight.data.normal_(std=0.1).add_("norm" in name and "bias" not in name)
            elif "relative_attention_bias" in name:
                weight.data.normal_(std=1.0)
            elif not any(part in name for part in ("embedding", "shared", "embed_tokens")):
                weight.data.normal_(std=weight.shape[1] ** -0.5 * (0.5 if "SelfAttention" in name else 1))
    return {part: network.eval() for part, network in made.items()}


def named(part: str, state: Mapping[str, torch.Tensor]) -> View:
    """An encoder's tensors under our names, from those that transformers saves."""
    return text_folder_map(TextPart(part, CONFIGS[part], ()), state.keys()).to_ours(state, part)


def one_by_one(told: TextFeatures | Conditioning) -> torch.Tensor:
    """The tokens (B, N, D) as diffusers has them, two that stand for many as so many."""
    if told.mask is None:
        return told.tokens
    (first, second), counts = (told.mask[0] != 1).nonzero().flatten().tolist(), told.mask[0]
    assert second == first + 1 and torch.equal(told.tokens[:, first], told.tokens[:, second])
    many = torch.ones_like(counts)
    many[first], many[second] = counts[first : second + 1].sum().round(), 0
    return spread(told.tokens, many)


# --- whole models --------------------------------------------------------------------------------------------------

SIDE = 64  # pixels; the small autoencoders have a factor of 4
PLAIN = MMDiTConfig(layers=3, heads=3, head_width=16, context=96, pooled=72, positions=12)
TRANSFORMERS = {
    "sd3-medium": PLAIN,
    "sd3.5-medium": replace(PLAIN, positions=24, qk_norm=True, dual=(0, 1)),
    "sd3.5-large": replace(PLAIN, layers=4, heads=4, qk_norm=True),
}
TRANSFORMERS["sd3.5-large-turbo"] = TRANSFORMERS["sd3.5-large"]


def small(kind: str) -> System:
    system = SYSTEMS[kind]
    text = tuple(replace(part, config=CONFIGS[part.name]) for part in system.text)
    vae = replace(system.vae, widths=(32, 64, 64))
    return System(TRANSFORMERS[kind], vae, text, SIDE)


SMALL = {kind: small(kind) for kind in TRANSFORMERS}


def tensors_of(kind: str, seed: int = 5) -> dict[str, dict[str, torch.Tensor]]:
    """Part to its tensors, random, under the names of a diffusers folder."""
    torch.manual_seed(seed)
    transformer = MMDiT(SMALL[kind].transformer)
    for name, weight in transformer.named_parameters():
        if weight.ndim == 1:
            weight.data.normal_(std=0.1).add_("norm_" in name and name.endswith("weight"))
    transformer.pos_embed.pos_embed.normal_(std=0.5)
    parts = {"transformer": transformer.state_dict(), "vae": AutoencoderKL(SMALL[kind].vae).state_dict()}
    texts = {name: dict(network.state_dict()) for name, network in theirs(seed).items()}
    texts["text_encoder"][PROJECTION] = torch.eye(NARROW.width)  # as it is published
    texts["text_encoder_3"].pop("encoder.embed_tokens.weight", None)
    return parts | {
        part: {name: tensor.contiguous() for name, tensor in named.items() if "position_ids" not in name}
        for part, named in texts.items()
    }


def write(kind: str, place: Path, seed: int = 5, without: Collection[str] = (), **scheduler: object) -> Path:
    """A diffusers folder of the small kind. without: parts to leave out; `scheduler`: more of its scheduler's JSON."""
    system = SMALL[kind]
    configs = {
        "transformer": folder.transformer_config(system.transformer, SIDE // 4),
        "vae": published.vae_config(system.vae, SIDE),
    } | {part.name: published.text_config(part.config) for part in system.text}
    there = {name: tensors for name, tensors in tensors_of(kind, seed).items() if name not in without}
    for name, tensors in there.items():
        save_tensors(place / name / f"{published.WEIGHTS[name]}.safetensors", tensors)
        write_json(place / name / published.CONFIG, configs[name])
    for reader in READERS:
        if reader.part in there:
            tokenizer = place / published.tokenizer_folder(reader.part)
            if reader.part == READERS[-1].part:
                t5_tokenizer(tokenizer)
            else:
                save_folder(bundled(reader.pad), tokenizer)
    config = folder.scheduler_config() | scheduler
    write_json(place / published.SCHEDULER, config)
    write_json(place / published.INDEX, folder.model_index(system, folder.SCHEDULER, there))
    return place
