"""What a Stable Diffusion's U-Net is called in LoRAs' files, and how it draws with LoRAs made for few steps."""

from __future__ import annotations

from sfumato.families.published.adapters import PEFT, Naming

NAMING = Naming(
    dotted=("unet.", "", f"{PEFT}unet.", PEFT, "diffusion_model.", f"{PEFT}diffusion_model.", "lora_unet."),
    flat=("lora_unet_", "lycoris_", "lycoris_unet_"),
    blocks={"unet": "unet", "down": "unet.down_blocks", "mid": "unet.mid_block", "up": "unet.up_blocks"},
    original=lambda kind: kind.startswith("sdxl"),
    few={  # LCM: Luo et al. 2023 (2311.05556); Turbo, Lightning and Hyper-SD: the models' published pages
        "lcm": {"guidance": 1.0, "sampler": "lcm", "schedule": "lcm"},
        "hyper": {"guidance": 1.0, "sampler": "ddim", "schedule": "trailing"},
        "turbo": {"guidance": 1.0, "sampler": "euler", "schedule": "trailing"},
    },
    aliases={"to_out.0": "to_out"},  # diffusers' old processors, and some of its later files
)
