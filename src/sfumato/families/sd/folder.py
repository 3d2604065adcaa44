"""The diffusers folder of a Stable Diffusion: the JSON of its U-Net, of its scheduler and of the whole.

Values are those of the published folders' `config.json`, `scheduler_config.json` and `model_index.json`, less what only
repeats a default.
"""

from __future__ import annotations

from typing import Any

from sfumato.families.published.folder import (
    CONFIG,
    INDEX,
    SCHEDULER,
    VERSION,
    WEIGHTS,
    text_config,
    text_entries,
    tokenizer_folder,
    vae_config,
)
from sfumato.families.sd.shapes import System
from sfumato.nn.unet import UNetConfig

__all__ = [  # all that such a folder needs, the shared part with it
    "CONFIG",
    "INDEX",
    "SCHEDULER",
    "WEIGHTS",
    "model_index",
    "scheduler_config",
    "text_config",
    "tokenizer_folder",
    "unet_config",
    "vae_config",
]

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
        index |= text_entries(part)
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
