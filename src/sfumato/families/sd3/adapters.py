"""What the transformer of Stable Diffusion 3 is called in LoRAs' files, and how it draws with LoRAs for few steps."""

from __future__ import annotations

from sfumato.families.published.adapters import PEFT, Naming

FLOW = {"guidance": 1.0, "sampler": "euler", "schedule": "flow_match"}
NAMING = Naming(
    dotted=(
        "transformer.",
        "",
        f"{PEFT}transformer.",
        PEFT,
        "diffusion_model.",
        f"{PEFT}diffusion_model.",
        "lora_transformer.",
        "lora_unet.",
    ),
    flat=("lora_unet_", "lora_transformer_", "lycoris_", "lycoris_transformer_"),
    blocks={"transformer": "transformer", "blocks": "transformer.transformer_blocks"},
    original=lambda kind: True,
    few={"turbo": FLOW, "hyper": FLOW},
    aliases={"to_out.0": "to_out"},
)
