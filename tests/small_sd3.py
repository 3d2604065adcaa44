"""Stable Diffusion 3's text encoders small, with random weights, and T5's tokens for a few words."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from sfumato.families.sd3.condition import READERS, TextShape
from sfumato.text.clip import ClipConfig
from sfumato.text.t5 import T5Config

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
