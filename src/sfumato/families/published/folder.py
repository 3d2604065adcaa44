"""The diffusers folder: where a part's weights stand, and the JSON that describes the parts that families share.

Values are those of the published folders' `config.json`, less what only repeats a default.
"""

from __future__ import annotations

from typing import Any

from sfumato.autoencoder.kl import TEMPORAL, KLConfig
from sfumato.families.published.kinds import TextConfig, TextPart
from sfumato.text.clip import ClipConfig
from sfumato.text.t5 import T5Config
from sfumato.text.vision import MEAN, STD, ClipVisionConfig
from sfumato.text.windows import LENGTH

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = {  # part to the stem of its weights
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
    "image_encoder": "model",
}
PROCESSOR = "preprocessor_config.json"
VERSION = (
    "0.35.0"  # of diffusers, whose folders these equal; its inpainting pipeline refuses an index without one
)


def vae_config(config: KLConfig, size: int) -> dict[str, Any]:
    """`vae/config.json`. size: pixels per side that it was trained on."""
    levels = len(config.widths)
    values = {
        "_class_name": "AutoencoderKL",
        "sample_size": size,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.resnets,
        "norm_num_groups": config.groups,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": config.scaling_factor,
        "force_upcast": config.force_upcast,
    }
    if config.temporal:  # what it always has, its JSON has no fields for
        own = ("norm_num_groups", "up_block_types", "out_channels")
        return {name: value for name, value in values.items() if name not in own} | {"_class_name": TEMPORAL}
    if config.shift_factor:
        values["shift_factor"] = config.shift_factor
    absent = {name: False for name in ("use_quant_conv", "use_post_quant_conv") if not getattr(config, name)}
    return values | absent


def text_config(config: TextConfig) -> dict[str, Any]:
    """`config.json` of an encoder of texts or of pictures."""
    if isinstance(config, ClipVisionConfig):
        return vision_config(config)
    return t5_config(config) if isinstance(config, T5Config) else clip_config(config)


def vision_config(config: ClipVisionConfig) -> dict[str, Any]:
    """`config.json` of CLIP's picture encoder."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "layer_norm_eps": 1e-5,
        **config.to_json(),
    }


def processor_config(config: ClipVisionConfig) -> dict[str, Any]:
    """`preprocessor_config.json` of what brings pictures to CLIP's form."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": config.size, "width": config.size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": config.size},
    }


def clip_config(config: ClipConfig) -> dict[str, Any]:
    """`config.json` of a CLIP. The end of a text is found as the largest token, which `eos_token_id` 2 asks for."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "max_position_embeddings": LENGTH,
        "hidden_size": config.width,
        "intermediate_size": config.inner or 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "projection_dim": config.projection or config.width,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def t5_config(config: T5Config) -> dict[str, Any]:
    """`config.json` of T5's encoder."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": config.width,
        "d_ff": config.inner,
        "d_kv": config.head_width,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "vocab_size": config.vocabulary,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.distance,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def tokenizer_folder(part: str) -> str:
    """Where what prepares an encoder's input lies: `tokenizer_2` for `text_encoder_2`."""
    return part.replace("text_encoder", "tokenizer").replace("image_encoder", "feature_extractor")


def text_entries(part: TextPart) -> dict[str, list[str]]:
    """What `model_index.json` says of an encoder and of its tokenizer: library and class."""
    if isinstance(part.config, ClipVisionConfig):
        network, tokenizer = "CLIPVisionModelWithProjection", "CLIPImageProcessor"
    elif isinstance(part.config, T5Config):
        network, tokenizer = "T5EncoderModel", "T5TokenizerFast"
    else:
        network = "CLIPTextModelWithProjection" if part.config.projection else "CLIPTextModel"
        tokenizer = "CLIPTokenizer"
    return {
        part.name: ["transformers", network],
        tokenizer_folder(part.name): ["transformers", tokenizer],
    }
