"""The diffusers folder of a Stable Video Diffusion: the JSON of its U-Net, of its scheduler and of the whole.

Values are those of the published folders' `config.json`, `scheduler_config.json` and `model_index.json`.
"""

from __future__ import annotations

from typing import Any

from sfumato.families.published.folder import VERSION, text_entries
from sfumato.families.svd.shapes import System
from sfumato.nn.spacetime import SpaceTimeConfig

SIGMAS = (0.002, 700.0)  # the ends of the noise levels
SCHEDULER = "EulerDiscreteScheduler"


def unet_config(config: SpaceTimeConfig, cells: int, frames: int) -> dict[str, Any]:
    """`unet/config.json`. cells: latent cells per side, and frames of a clip, that it was trained on."""
    depths = config.depths
    down = ["CrossAttnDownBlockSpatioTemporal" if depth else "DownBlockSpatioTemporal" for depth in depths]
    up = ["CrossAttnUpBlockSpatioTemporal" if depth else "UpBlockSpatioTemporal" for depth in depths]
    return {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "sample_size": cells,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.resnets,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "transformer_layers_per_block": max(config.depths),
        "num_attention_heads": list(config.heads),
        "cross_attention_dim": config.context,
        "addition_time_embed_dim": config.waves,
        "projection_class_embeddings_input_dim": config.told * config.waves,
        "num_frames": frames,
    }


def scheduler_config() -> dict[str, Any]:
    """`scheduler_config.json`."""
    return {
        "_class_name": SCHEDULER,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "sigma_min": SIGMAS[0],
        "sigma_max": SIGMAS[1],
        "timestep_spacing": "leading",
        "timestep_type": "continuous",
        "steps_offset": 1,
        "use_karras_sigmas": True,
    }


def model_index(system: System, scheduler: str) -> dict[str, Any]:
    """`model_index.json`: the pipeline, and the library and class of each part. scheduler: its class."""
    index: dict[str, Any] = {
        "_class_name": "StableVideoDiffusionPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
        "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
    }
    for part in system.text:
        index |= text_entries(part)
    return index
