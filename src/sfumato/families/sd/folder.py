"""The diffusers folder of a Stable Diffusion: which files stand where, and the JSON that describes each part.

Values are those of the published folders' `config.json`, `scheduler_config.json` and `model_index.json`, less what only
repeats a default.
"""

from __future__ import annotations

from typing import Any

from sfumato.autoencoder.kl import KLConfig
from sfumato.families.sd.shapes import System
from sfumato.nn.unet import UNetConfig
from sfumato.text.clip import ClipConfig
from sfumato.text.windows import LENGTH

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = {  # part to the stem of its weights
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd1-inpaint": "StableDiffusionInpaintPipeline",
    "sd1-lcm": "LatentConsistencyModelPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2-inpaint": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-inpaint": "StableDiffusionXLInpaintPipeline",
    "sdxl-lcm": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
}
VERSION = (
    "0.35.0"  # of diffusers, whose folders these equal; its inpainting pipeline refuses an index without one
)
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def unet_config(config: UNetConfig, cells: int, upcast: bool = False) -> dict[str, Any]:
    """`unet/config.json`. cells: latent cells per side that it was trained on. upcast: attention scores in float32."""
    depths, heads = config.depths, config.heads
    values: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": cells,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.resnets,
        "norm_num_groups": config.groups,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": _depths(config),
        # diffusers calls it a width and reads it as the number of heads
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else list(heads),
        "cross_attention_dim": config.context,
        "use_linear_projection": config.linear,
        "upcast_attention": upcast,
    }
    if config.vector:
        values |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config.vector,
        }
    if config.time_cond:
        values["time_cond_proj_dim"] = config.time_cond
    return values


def _depths(config: UNetConfig) -> int | list[int]:
    """One number where all transformers are as deep, else one per level; the middle is as deep as the last."""
    if {depth for depth in config.depths if depth} == {config.mid_depth}:
        return config.mid_depth
    return [depth or 1 for depth in config.depths]


def vae_config(config: KLConfig, size: int) -> dict[str, Any]:
    """`vae/config.json`. size: pixels per side that it was trained on."""
    levels = len(config.widths)
    return {
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


def text_config(config: ClipConfig) -> dict[str, Any]:
    """`text_encoder/config.json`. The end of a text is found as the largest token, which `eos_token_id` 2 asks for."""
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


def tokenizer_folder(part: str) -> str:
    """Where the tokenizer of a text encoder lies: `tokenizer_2` for `text_encoder_2`."""
    return part.replace("text_encoder", "tokenizer")


def scheduler_config(kind: str, prediction: str = "epsilon", zero_snr: bool = False) -> dict[str, Any]:
    """`scheduler_config.json`. prediction: "epsilon" or "v". zero_snr: the last step of training was pure noise."""
    config = {
        "_class_name": _scheduler_class(kind, prediction),
        **BETAS,
        "prediction_type": "v_prediction" if prediction == "v" else prediction,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    if not kind.startswith("sdxl"):
        config["set_alpha_to_one"] = False
    if config["_class_name"] == "PNDMScheduler":
        config["skip_prk_steps"] = True
    elif not kind.startswith("sdxl"):
        config["clip_sample"] = False
    if zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def _scheduler_class(kind: str, prediction: str) -> str:
    if kind.endswith("-lcm"):
        return "LCMScheduler"
    if kind.startswith("sdxl"):
        return "EulerDiscreteScheduler"
    return "DDIMScheduler" if prediction == "v" else "PNDMScheduler"


def model_index(kind: str, system: System, scheduler: str) -> dict[str, Any]:
    """`model_index.json`: the pipeline, and the library and class of each part. scheduler: its class."""
    index: dict[str, Any] = {
        "_class_name": PIPELINES[kind],
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for part in system.text:
        with_projection = "CLIPTextModelWithProjection" if part.config.projection else "CLIPTextModel"
        index[part.name] = ["transformers", with_projection]
        index[tokenizer_folder(part.name)] = ["transformers", "CLIPTokenizer"]
    if not kind.startswith("sdxl"):
        return index | {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    index["force_zeros_for_empty_prompt"] = kind != "sdxl-refiner"
    if kind == "sdxl-refiner":
        nothing = {"text_encoder": [None, None], "tokenizer": [None, None]}
        return index | nothing | {"requires_aesthetics_score": True}
    return index
