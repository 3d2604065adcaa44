"""What the modules of Stable Diffusion are called in LoRAs' files, and how LoRAs made for few steps are drawn with.

Sources of the spellings: kohya-ss/sd-scripts networks/lora.py and library/sdxl_model_util.py; diffusers
utils/state_dict_utils.py; LyCORIS (`lycoris_` of its wrapper); ComfyUI comfy/lora.py, which reads what OneTrainer and
SimpleTuner write.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sfumato.adapters.lora import Lora
from sfumato.adapters.names import Names, PartNames, modules, same, with_aliases
from sfumato.families.lora import require_family
from sfumato.families.sd.keys import clip_map, unet_map
from sfumato.families.sd.shapes import System, TextPart

PEFT = "base_model.model."
UNET_DOTTED = ("unet.", "", f"{PEFT}unet.", PEFT, "diffusion_model.", f"{PEFT}diffusion_model.", "lora_unet.")
UNET_FLAT = ("lora_unet_", "lycoris_", "lycoris_unet_")
UNET_ALIASES = {"to_out.0": "to_out"}  # diffusers' old processors, and some of its later files
TEXT_ALIASES = {  # names of a U-Net's attention, which old diffusers gave CLIP's too
    "self_attn.q_proj": "self_attn.to_q",
    "self_attn.k_proj": "self_attn.to_k",
    "self_attn.v_proj": "self_attn.to_v",
    "self_attn.out_proj": "self_attn.to_out",
}
BLOCKS = {"unet": "unet", "down": "unet.down_blocks", "mid": "unet.mid_block", "up": "unet.up_blocks"}


def names_of(kind: str, system: System) -> Names:
    """All spellings of the modules of one kind of `SYSTEMS`."""
    table = unet_map(system.unet)
    ours = sorted({name for names in modules(table).values() for name in names})
    tables = (with_aliases(same(ours), UNET_ALIASES), modules(table))
    parts = [PartNames("unet", tables, UNET_DOTTED, UNET_FLAT)]
    parts += [_text(part, number, system) for number, part in enumerate(system.text, 1)]
    texts = tuple(part.name for part in system.text)
    blocks = {name: (start,) for name, start in BLOCKS.items()} | {"text": texts}
    blocks |= {f"text{number}": (name,) for number, name in enumerate(texts, 1)}
    return Names(kind, tuple(parts), blocks)


def _text(part: TextPart, number: int, system: System) -> PartNames:
    """A text encoder: `te1` and `te2` of two; `te` is the first, or the only one, whatever its place."""
    first = number == 1
    place = 2 if part.name.endswith("_2") else 1
    dotted = [f"{part.name}.", f"{PEFT}{part.name}.", f"lora_te{place}."]
    flat = [f"lora_te{place}_", f"lycoris_te{place}_"]
    if first:
        dotted += ["text_encoder.", f"{PEFT}text_encoder.", "lora_te."]
        flat += ["lora_te_", "lycoris_te_"]
    if len(system.text) == 1:
        dotted += ["", PEFT]
    table = with_aliases(modules(clip_map(part.config)), TEXT_ALIASES)
    return PartNames(part.name, (table,), tuple(dotted), tuple(flat))


def check(path: Path, kind: str) -> None:
    """`CheckpointError` that says whose LoRA it is, if it is plainly not one for this kind. Reads the header alone."""
    require_family(path, kind if kind.startswith("sdxl-refiner") else kind.split("-")[0])


# --- few steps -----------------------------------------------------------------------------------------------------

_FEW = re.compile(r"(?<!\d)(\d)[ _-]?steps?(?![a-z])", re.IGNORECASE)


def few_steps(lora: Lora) -> dict[str, Any]:
    """How a LoRA that distils a model into few steps is drawn with, told by its name and its notes; {} for others.

    LCM: 4 steps of `lcm`, guidance 1 (Luo et al. 2023, 2311.05556). Turbo, Lightning, Hyper-SD: Euler (Hyper-SD: DDIM)
    on trailing steps, guidance 1; as many steps as the name says, else 4 (the models' published pages).
    """
    notes = ("ss_output_name", "ss_sd_model_name", "modelspec.title", "ss_training_comment", "name")
    texts = [
        lora.path.stem,
        lora.path.parent.name if lora.path.stem.startswith(("pytorch_lora", "adapter_")) else "",
    ]
    texts += [lora.metadata.get(note, "") for note in notes[2:] + notes[:1]]
    words = " ".join([lora.name, *texts]).lower()

    def said(*marks: str) -> bool:
        return any(re.search(rf"(?<![a-z]){mark}(?![a-z])", words) for mark in marks)

    steps = int(found[1]) if (found := _FEW.search(words)) and found[1] != "0" else 4
    if said("lcm"):
        return {"steps": steps, "guidance": 1.0, "sampler": "lcm", "schedule": "lcm"}
    if said("hyper", "hypersd", "hypersdxl", r"hyper-?sd(xl|15)?"):
        return {"steps": steps, "guidance": 1.0, "sampler": "ddim", "schedule": "trailing"}
    if said("lightning", "turbo"):
        return {"steps": steps, "guidance": 1.0, "sampler": "euler", "schedule": "trailing"}
    return {}
