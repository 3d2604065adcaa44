"""The marks of networks that families of checkpoints share, and of files that are recognised and refused by name.

What names and shapes cannot tell is left open: a VAE alone, or a text encoder, is of no family. The VAEs of SD 1, SD 2
and SDXL have the same tensors, so one alone is "f8c4" and the caller says whose it is; that of SD 3 is "f8c16".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.detect import Shape, Signature
from sfumato.families.published.keys import DENOISER_PREFIX, VAE_PREFIX
from sfumato.families.published.kinds import TextConfig
from sfumato.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, ClipConfig
from sfumato.text.t5 import T5_XXL, T5Config
from sfumato.text.vision import OPENCLIP_VIT_H, PROJECTION, ClipVisionConfig
from sfumato.text.windows import LENGTH

VAES: dict[str, KLConfig] = {
    "f8c4": KLConfig(),
    "f8c16": KLConfig(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "f8c4-temporal": KLConfig(temporal=True, use_post_quant_conv=False),
}
TEXTS: dict[str, TextConfig] = {
    "clip-l": CLIP_L,
    "openclip-h": OPENCLIP_H,
    "openclip-bigg": OPENCLIP_BIGG,
    "t5-xxl": T5_XXL,
    "clip-vit-h": OPENCLIP_VIT_H,
}
LATER = "not supported yet"


def text_kind(config: TextConfig) -> str | None:
    """What a text encoder of this shape is called when it is alone: CLIP-L has its projection in some files only."""
    plain = replace(config, projection=0) if isinstance(config, ClipConfig) else config
    return next((kind for kind, known in TEXTS.items() if known in (config, plain)), None)


def _vaes() -> list[Signature]:
    found = []
    for (kind, config), prefix in product(VAES.items(), (VAE_PREFIX, "vae.", "")):
        channels = config.latent_channels
        marks: dict[str, Shape] = {
            "encoder.conv_in.weight": (128, 3, 3, 3),
            "encoder.conv_out.weight": (2 * channels, 512, 3, 3),
            "decoder.conv_in.weight": (512, channels, 3, 3),
            "decoder.conv_out.weight": (3, 128, 3, 3),
        }
        absent = [f"{DENOISER_PREFIX}*"]
        if config.use_quant_conv:
            marks["quant_conv.weight"] = (2 * channels, 2 * channels, 1, 1)
        else:
            absent.append(f"{prefix}quant_conv.weight")
        names = [
            ("original", "decoder.up.3.block.0.conv1.weight"),
            ("diffusers", "decoder.up_blocks.0.resnets.0.conv1.weight"),
        ]
        if config.temporal:  # alone it is kept in this layout only: the other lacks a part of the encoder
            names = [("diffusers", "decoder.up_blocks.0.resnets.0.spatial_res_block.conv1.weight")]
        for layout, name in names:
            required = {prefix + mark: shape for mark, shape in marks.items()} | {
                prefix + name: (512, 512, 3, 3)
            }
            found.append(Signature(kind, "vae", layout, required, tuple(absent), prefix))
    return found


def _texts() -> list[Signature]:
    found = []
    for kind, text in TEXTS.items():
        if isinstance(text, T5Config):
            found.append(_t5(kind, text))
            continue
        if isinstance(text, ClipVisionConfig):
            found.append(_vision(kind, text))
            continue
        for inner in ("text_model.", ""):
            required: dict[str, Shape] = {
                f"{inner}embeddings.token_embedding.weight": (None, text.width),
                f"{inner}embeddings.position_embedding.weight": (LENGTH, text.width),
                f"{inner}encoder.layers.{text.layers - 1}.mlp.fc1.weight": (4 * text.width, text.width),
                f"{inner}final_layer_norm.weight": (text.width,),
            }
            if text.projection:
                required["text_projection.weight"] = (text.projection, text.width)
            beyond = f"{inner}encoder.layers.{text.layers}.mlp.fc1.weight"
            found.append(Signature(kind, "text_encoder", "diffusers", required, (beyond,)))
    return found


def _t5(kind: str, text: T5Config) -> Signature:
    last = f"encoder.block.{text.layers - 1}.layer.1.DenseReluDense.wo.weight"
    required: dict[str, Shape] = {
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (text.buckets, text.heads),
        last: (text.width, text.inner),
        "encoder.final_layer_norm.weight": (text.width,),
    }
    return Signature(
        kind, "text_encoder", "diffusers", required, (f"encoder.block.{text.layers}.*", "decoder.*")
    )


def _vision(kind: str, config: ClipVisionConfig) -> Signature:
    layers = "vision_model.encoder.layers."
    required: dict[str, Shape] = {
        "vision_model.embeddings.patch_embedding.weight": (config.width, 3, config.patch, config.patch),
        f"{layers}{config.layers - 1}.mlp.fc1.weight": (config.inner, config.width),
        PROJECTION: (config.projection, config.width),
    }
    return Signature(kind, "image_encoder", "diffusers", required, (f"{layers}{config.layers}.*",))


def refused(
    refusal: str, *alternatives: Mapping[str, Shape | None] | str, without: tuple[str, ...] = ()
) -> list[Signature]:
    """Signatures of what is refused: one for each set of marks, or each single name. `without` names what it lacks."""
    marks = [{given: None} if isinstance(given, str) else given for given in alternatives]
    return [Signature("", "", "", required, without, refusal=refusal) for required in marks]


def neighbours() -> list[Signature]:
    """What is kept beside checkpoints of every family, and is none that we can use."""
    return [
        *refused(
            "a VAE with a temporal decoder in its original names, which lack the convolution after its encoder; give "
            "the whole checkpoint, or its diffusers folder",
            f"{VAE_PREFIX}decoder.mid.block_1.time_stack.in_layers.0.weight",
            "decoder.mid.block_1.time_stack.in_layers.0.weight",
            without=(f"{DENOISER_PREFIX}*",),
        ),
        *refused(
            "a FLUX checkpoint, not supported",
            {"single_transformer_blocks.0.attn.to_q.weight": None, "context_embedder.weight": None},
            f"{DENOISER_PREFIX}double_blocks.0.img_attn.norm.key_norm.scale",
            "double_blocks.0.img_attn.norm.key_norm.scale",
        ),
        *refused(
            "a LoRA; it belongs on a model, and is not one",
            "*.lora_down.weight",
            "*.lora_A.weight",
            "*.lora_A.default.weight",
            "*.lora.down.weight",
            "*_lora.down.weight",
            "*.lora_linear_layer.down.weight",
            "*.hada_w1_a",
            "*.lokr_w1",
            "*.lokr_w1_a",
        ),
        *refused("an adapter of OFT, not supported", "*.oft_blocks", "*.oft_diag", "*.oft_R*"),
        *refused("an adapter of GLoRA, not supported", {"*.a1.weight": None, "*.b1.weight": None}),
        *refused("an adapter of IA3, not supported", "*.on_input", "*.ia3_l"),
        *refused(
            "a textual-inversion embedding; it belongs on a model, and is not one",
            "emb_params",
            {"clip_g": (None, 1280), "clip_l": (None, 768)},
        ),
        *refused("an IP-Adapter, not supported", "image_proj.*", "ip_adapter.*"),
    ]


def shared_signatures() -> tuple[Signature, ...]:
    """Of what is no family's own: VAEs and text encoders alone, and what is refused."""
    return (*_vaes(), *_texts(), *neighbours())
