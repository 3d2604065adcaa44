"""The marks by which Stable Diffusion files are told apart, and their neighbours that are refused by name.

What names and shapes cannot tell is left open: the VAEs of SD 1, SD 2 and SDXL have the same tensors, so a VAE alone is
"f8c4" and the caller says whose it is. Whether an SD 2 predicts noise or v is guessed from its numbers (`predicts_v`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sfumato.checkpoint.detect import Shape, Signature
from sfumato.families.sd.keys import UNET_PREFIX, VAE_PREFIX
from sfumato.families.sd.shapes import SYSTEMS, System
from sfumato.nn.unet import UNetConfig
from sfumato.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, ClipConfig
from sfumato.text.windows import LENGTH

# names at the top of a single file that say how it was trained (ComfyUI, comfy/supported_models.py, which reads them
# for SDXL; here they are read for all)
MARKERS: dict[tuple[str, ...], dict[str, Any]] = {
    (): {},
    ("v_pred",): {"prediction": "v"},
    ("v_pred", "ztsnr"): {"prediction": "v", "zero_snr": True},
}
TEXTS: dict[str, ClipConfig] = {"clip-l": CLIP_L, "openclip-h": OPENCLIP_H, "openclip-bigg": OPENCLIP_BIGG}
COND = "time_embedding.cond_proj.weight"  # of a U-Net that is told the guidance scale
V_DEVIATION = 0.09


def predicts_v(unet: Mapping[str, Tensor], config: UNetConfig) -> bool:
    """Whether an SD 2 U-Net predicts v, by the spread of one bias in its last transformer: above 0.09 in those that do.

    unet: tensors under our names; one is read. A rule of thumb of ComfyUI's (comfy/supported_models.py, class SD20),
    and nothing better is in the file; an explicit choice of the user comes before it. Inpainting models predict noise.
    """
    last = f"up_blocks.{len(config.channels) - 1}.attentions.{config.resnets}"
    return float(unet[f"{last}.transformer_blocks.0.norm1.bias"].float().std(correction=0)) > V_DEVIATION


def _unet_marks(config: UNetConfig, original: bool) -> dict[str, Shape]:
    """The tensors that tell U-Nets apart: entrance, exit, width of the text, deepest transformer, and vector."""
    first, level = config.channels[0], next(i for i, depth in enumerate(config.depths) if depth)
    deep = len(config.depths) - 1 - next(i for i, depth in enumerate(reversed(config.depths)) if depth)
    width, narrow = config.channels[deep], config.channels[level]
    blocks = config.resnets + 1
    if original:
        entrance, time, vector, exit_ = "input_blocks.0.0", "time_embed.0", "label_emb.0.0", "out.2"
        shallow, deepest = f"input_blocks.{1 + level * blocks}.1", f"input_blocks.{2 + deep * blocks}.1"
        end = f"output_blocks.{len(config.channels) * blocks - 1}.0.in_layers.2"
    else:
        entrance, time, vector = "conv_in", "time_embedding.linear_1", "add_embedding.linear_1"
        exit_, end = "conv_out", f"up_blocks.{len(config.channels) - 1}.resnets.{config.resnets}.conv1"
        shallow, deepest = f"down_blocks.{level}.attentions.0", f"down_blocks.{deep}.attentions.1"
    last = config.depths[deep] - 1
    marks: dict[str, Shape] = {
        f"{entrance}.weight": (first, config.in_channels, 3, 3),
        f"{exit_}.weight": (4, first, 3, 3),
        f"{time}.weight": (4 * first, first),
        f"{end}.weight": (first, 2 * first, 3, 3),
        f"{shallow}.proj_in.weight": (narrow, narrow) if config.linear else (narrow, narrow, 1, 1),
        f"{shallow}.transformer_blocks.0.attn2.to_k.weight": (narrow, config.context),
        f"{deepest}.transformer_blocks.{last}.attn2.to_k.weight": (width, config.context),
    }
    if config.time_cond:
        marks[COND] = (first, config.time_cond)
    if config.vector:
        marks[f"{vector}.weight"] = (4 * first, config.vector)
    return marks


def _unets(systems: Mapping[str, System]) -> list[Signature]:
    found = []
    for kind, system in systems.items():
        for layout, part, prefix in (
            ("original", "checkpoint", UNET_PREFIX),
            ("original", "unet", ""),
            ("diffusers", "unet", ""),
        ):
            own = _unet_marks(system.unet, original=layout == "original")
            marks = {prefix + name: shape for name, shape in own.items()}
            absent = [] if system.unet.vector else ["label_emb.*", "add_embedding.*", "class_embedding.*"]
            absent += [] if system.unet.time_cond else [COND]
            for names, traits in MARKERS.items():
                forbidden = [prefix + name for name in absent]
                forbidden += [name for name in ("v_pred", "ztsnr") if name not in names]
                required = marks | dict.fromkeys(names)
                found.append(Signature(kind, part, layout, required, tuple(forbidden), prefix, traits))
    return found


def _vaes() -> list[Signature]:
    found = []
    for prefix in (VAE_PREFIX, "vae.", ""):
        marks: dict[str, Shape] = {
            "encoder.conv_in.weight": (128, 3, 3, 3),
            "encoder.conv_out.weight": (8, 512, 3, 3),
            "quant_conv.weight": (8, 8, 1, 1),
            "decoder.conv_in.weight": (512, 4, 3, 3),
            "decoder.conv_out.weight": (3, 128, 3, 3),
        }
        for layout, name in (
            ("original", "decoder.up.3.block.0.conv1.weight"),
            ("diffusers", "decoder.up_blocks.0.resnets.0.conv1.weight"),
        ):
            required = {prefix + mark: shape for mark, shape in marks.items()} | {
                prefix + name: (512, 512, 3, 3)
            }
            found.append(Signature("f8c4", "vae", layout, required, (f"{UNET_PREFIX}*",), prefix))
    return found


def _texts() -> list[Signature]:
    found = []
    for kind, text in TEXTS.items():
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


def _refused(
    refusal: str, *alternatives: Mapping[str, Shape | None] | str, without: tuple[str, ...] = ()
) -> list[Signature]:
    """Signatures of what is refused: one for each set of marks, or each single name. `without` names what it lacks."""
    marks = [{given: None} if isinstance(given, str) else given for given in alternatives]
    return [Signature("", "", "", required, without, refusal=refusal) for required in marks]


def _neighbours() -> list[Signature]:
    """What resembles a Stable Diffusion file, or is kept beside one, and is none that we can use."""
    later = "not supported yet"
    entrances = (f"{UNET_PREFIX}input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight")
    middles: tuple[str, ...] = (
        f"{UNET_PREFIX}middle_block.0.in_layers.2.weight",
        "middle_block.0.in_layers.2.weight",
    )
    middles += ("mid_block.resnets.0.conv1.weight",)

    def channels(count: int, *widths: int) -> list[dict[str, Shape | None]]:
        """U-Nets whose entrance reads this many channels."""
        return [
            {entrance: (width, count, 3, 3), middle: None}
            for entrance, middle in zip(entrances, middles, strict=True)
            for width in widths
        ]

    return [
        *_refused(
            f"an SVD checkpoint (Stable Video Diffusion), {later}",
            f"{UNET_PREFIX}input_blocks.8.0.time_mixer.mix_factor",
            "input_blocks.8.0.time_mixer.mix_factor",
            "down_blocks.0.resnets.0.temporal_res_block.conv1.weight",
        ),
        *_refused(
            f"SVD's VAE (temporal decoder), {later}",
            f"{VAE_PREFIX}decoder.mid.block_1.time_stack.in_layers.0.weight",
            "decoder.mid.block_1.time_stack.in_layers.0.weight",
            "decoder.mid_block.resnets.0.temporal_res_block.conv1.weight",
        ),
        *_refused(
            f"an SD3 ControlNet, {later}",
            {"controlnet_blocks.0.weight": None, "pos_embed_input.proj.weight": None},
        ),
        *_refused(
            f"an SD3 checkpoint, {later}",
            f"{UNET_PREFIX}joint_blocks.0.x_block.attn.qkv.weight",
            "joint_blocks.0.x_block.attn.qkv.weight",
            {"transformer_blocks.0.attn.add_q_proj.weight": None, "pos_embed.proj.weight": None},
        ),
        *_refused(
            "a FLUX checkpoint, not supported",
            {"single_transformer_blocks.0.attn.to_q.weight": None, "context_embedder.weight": None},
            f"{UNET_PREFIX}double_blocks.0.img_attn.norm.key_norm.scale",
            "double_blocks.0.img_attn.norm.key_norm.scale",
        ),
        *_refused(
            f"a VAE with 16 latent channels (SD3, FLUX), {later}",
            *({f"{prefix}decoder.conv_in.weight": (512, 16, 3, 3)} for prefix in (VAE_PREFIX, "vae.", "")),
        ),
        *_refused(
            "a ControlNet; it belongs on a model (--controlnet KIND=FILE), and is not one",
            "control_model.time_embed.0.weight",
            "input_hint_block.0.weight",
            "controlnet_cond_embedding.conv_in.weight",
        ),
        *_refused(
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
        *_refused(
            "a textual-inversion embedding; it belongs on a model, and is not one",
            "emb_params",
            {"clip_g": (None, 1280), "clip_l": (None, 768)},
        ),
        *_refused("an IP-Adapter, not supported", "image_proj.*", "ip_adapter.*"),
        *_refused("an AnimateDiff motion module, not supported", "*motion_modules.0.temporal_transformer.*"),
        *_refused("an InstructPix2Pix (8 input channels), not supported", *channels(8, 320)),
        *_refused("a depth-guided SD 2 (5 input channels), not supported", *channels(5, 320)),
        *_refused("the x4 upscaler (7 input channels), not supported", *channels(7, 256)),
        *_refused("a Zero123 checkpoint, not supported", "cc_projection.weight"),
        *_refused(
            "an unCLIP checkpoint of SD 2, not supported",
            *(
                {f"{prefix}{name}": (1280, width)}
                for name in ("label_emb.0.0.weight", "class_embedding.linear_1.weight")
                for prefix in (UNET_PREFIX, "")
                for width in (1536, 2048)
            ),
        ),
        *_refused(
            "a distilled SDXL with blocks left out (SSD-1B, Vega, KOALA), not supported",
            {f"{UNET_PREFIX}label_emb.0.0.weight": (1280, 2816)},
            {"label_emb.0.0.weight": (1280, 2816)},
            {"add_embedding.linear_1.weight": (1280, 2816), "conv_out.weight": None},
            without=(
                "*input_blocks.8.1.transformer_blocks.9.*",
                "down_blocks.2.attentions.1.transformer_blocks.9.*",
            ),
        ),
        *_refused("a Playground v2.5 checkpoint (EDM), not supported", "edm_mean"),
        *_refused("a CosXL checkpoint (EDM v-prediction), not supported", "edm_vpred.sigma_max"),
    ]


def signatures(systems: Mapping[str, System] = SYSTEMS) -> tuple[Signature, ...]:
    """All of them: what we read, alone and in whole files, in both layouts; and what we refuse."""
    return (*_unets(systems), *_vaes(), *_texts(), *_neighbours())
