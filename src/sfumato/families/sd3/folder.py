"""The diffusers folder of a Stable Diffusion 3: the JSON of its transformer, of its scheduler and of the whole.

Values are those of the published folders' `config.json`, `scheduler_config.json` and `model_index.json`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sfumato.families.published.folder import VERSION, text_entries
from sfumato.families.sd3.shapes import System
from sfumato.nn.mmdit import MMDiTConfig

SHIFT = 3.0  # of the noise levels towards noise (Esser et al. 2024, sec. 5.3.2)
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def transformer_config(config: MMDiTConfig, cells: int) -> dict[str, Any]:
    """`transformer/config.json`. cells: latent cells per side that it was trained on."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": cells,
        "patch_size": config.patch,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "num_layers": config.layers,
        "attention_head_dim": config.head_width,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled,
        "pos_embed_max_size": config.positions,
        "dual_attention_layers": list(config.dual),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def scheduler_config(shift: float = SHIFT) -> dict[str, Any]:
    """`scheduler_config.json`."""
    return {"_class_name": SCHEDULER, "num_train_timesteps": 1000, "shift": shift}


def model_index(system: System, scheduler: str, there: Collection[str]) -> dict[str, Any]:
    """`model_index.json`: the pipeline, and the library and class of each part. scheduler: its class. there: the parts
    that the folder has; a text encoder that it has not is named as absent, which diffusers can do without.
    """
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for part in system.text:
        entries = text_entries(part)
        index |= entries if part.name in there else {key: [None, None] for key in entries}
    return index
