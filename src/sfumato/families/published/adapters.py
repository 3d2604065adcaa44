"""What modules of published checkpoints are called in LoRAs' files, and how LoRAs made for few steps are drawn with.

Sources of the spellings: kohya-ss/sd-scripts networks/lora.py, networks/lora_sd3.py and library/sdxl_model_util.py;
diffusers utils/state_dict_utils.py; LyCORIS (`lycoris_` of its wrapper); ComfyUI comfy/lora.py, which reads what
OneTrainer and SimpleTuner write; OneTrainer modules/util/convert/lora/convert_sd3_lora.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from sfumato.adapters.fold import Adapters, Touched, Wish
from sfumato.adapters.lora import Lora
from sfumato.adapters.names import Names, PartNames, Share, inverse, modules, same, with_aliases
from sfumato.checks import shown
from sfumato.errors import InputError
from sfumato.families.lora import mark_of, require_family
from sfumato.families.published import keys

if TYPE_CHECKING:
    from sfumato.families.published.kinds import Family, Kind, TextPart

PEFT = "base_model.model."
TEXT_ALIASES = {  # names of a U-Net's attention, which old diffusers gave CLIP's too
    "self_attn.q_proj": "self_attn.to_q",
    "self_attn.k_proj": "self_attn.to_k",
    "self_attn.v_proj": "self_attn.to_v",
    "self_attn.out_proj": "self_attn.to_out",
}
OMI = {
    "text_encoder": "clip_l.",
    "text_encoder_2": "clip_g.",
    "text_encoder_3": "t5.",
}  # OneTrainer's newer names
COMFY = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",), "text_encoder_3": ("t5xxl",)}


@dataclass(frozen=True)
class Naming:
    """What a family's denoiser is called in adapters' files.

    dotted, flat: prefixes, as of `PartNames`. aliases: other endings of its paths. blocks: names of groups of its
    layers. original(kind): whether kohya's files have the original names for it, or ours. few: of ways to distil into
    few steps ("lcm", "turbo", "hyper"), what a request gets that leaves it open, beside the steps.
    """

    dotted: tuple[str, ...]
    flat: tuple[str, ...]
    blocks: Mapping[str, str]
    original: Callable[[str], bool]
    few: Mapping[str, Mapping[str, Any]]
    aliases: Mapping[str, str]


def adapters_of(
    family: Family,
    kind: str,
    system: Kind,
    parts: Mapping[str, Mapping[str, Tensor]],
    renew: Callable[[Touched], None],
) -> Adapters:
    """The LoRAs for a model of one of a family's kinds, with these parts. One without names for them takes none."""
    naming = family.naming
    if naming is None:
        return Adapters(lambda: refused(kind), parts, renew, lambda path: refused(kind))
    names = functools.cache(lambda: names_of(family, kind, system))
    mark, width = mark_of(kind), getattr(system.denoiser, "width", None)
    return Adapters(
        names,
        parts,
        renew,
        lambda path: require_family(path, mark, width),
        lambda lora: few_steps(lora, naming.few),
    )


def refused(kind: str) -> NoReturn:
    """`InputError`: a model of that kind takes no LoRAs."""
    raise InputError(f"a model of {kind} takes no LoRAs; leave them out", argument="loras")


def names_of(family: Family, kind: str, system: Kind) -> Names:
    """All spellings of the modules of one kind."""
    naming = family.naming
    assert naming is not None
    original = modules(family.denoiser_map(system.denoiser))
    ours = same(sorted({share.module for shares in original.values() for share in shares}))
    tables = (with_aliases(ours, naming.aliases), original)
    parts = [PartNames(family.denoiser, tables, naming.dotted, naming.flat)]
    parts += [_text(part, system) for part in system.text]
    texts = tuple(part.name for part in system.text)
    blocks = {name: (start,) for name, start in naming.blocks.items()} | {"text": texts}
    blocks |= {f"text{number}": (name,) for number, name in enumerate(texts, 1)}
    return Names(kind, tuple(parts), blocks)


def _text(part: TextPart, system: Kind) -> PartNames:
    """A text encoder: `te1`, `te2`, `te3` by its place; `te` is the first, or the only one, whatever its place."""
    alone, place = len(system.text) == 1, _place(part.name)
    dotted = [f"{part.name}.", f"{PEFT}{part.name}.", f"lora_te{place}.", OMI[part.name], *part.prefixes]
    dotted += [f"text_encoders.{clip}.transformer." for clip in COMFY[part.name]]
    flat = [f"lora_te{place}_", f"lycoris_te{place}_"]
    if part == system.text[0]:
        dotted += ["text_encoder.", f"{PEFT}text_encoder.", "lora_te."]
        flat += ["lora_te_", "lycoris_te_"]
    if alone:
        dotted += ["", PEFT]
    table = with_aliases(modules(keys.text_folder_map(part)), TEXT_ALIASES)
    return PartNames(part.name, (table,), tuple(dict.fromkeys(dotted)), tuple(flat))


def _place(part: str) -> int:
    last = part.rpartition("_")[2]
    return int(last) if last.isdigit() else 1


# --- kohya's spelling ------------------------------------------------------------------------------------------------


def kohya_prefix(family: Family, system: Kind, part: str) -> str:
    """What stands before a part's modules in kohya's files: a text encoder that is alone has no number."""
    if part == family.denoiser:
        return "lora_unet_"
    alone = len(system.text) == 1 and part == "text_encoder"
    return "lora_te_" if alone else f"lora_te{_place(part)}_"


def kohya_map(family: Family, kind: str, system: Kind, part: str) -> keys.KeyMap | None:
    """Of a part that kohya's files know by its original names, those to ours; None where it has ours."""
    if part == family.denoiser and family.naming is not None and family.naming.original(kind):
        return family.denoiser_map(system.denoiser)
    return None


def speller(family: Family, kind: str, system: Kind) -> Callable[[str, str], Share]:
    """What tells how a layout calls a layer: spell(path, layout), with the rows there that are the layer's.

    path: the part's name and the layer's. layout: "diffusers", its path; "kohya", one with underscores.
    """

    @functools.cache
    def originals(part: str) -> Mapping[str, Share] | None:
        table = kohya_map(family, kind, system, part)
        return None if table is None else inverse(modules(table))

    def spell(path: str, layout: str) -> Share:
        if layout == "diffusers":
            return Share(path)
        part, _, module = path.partition(".")
        known = originals(part)
        share = Share(module) if known is None else known[module]
        flat = kohya_prefix(family, system, part) + share.module.replace(".", "_")
        return Share(flat, share.rows, share.of)

    return spell


# --- few steps -------------------------------------------------------------------------------------------------------

_STEPS = re.compile(r"(?<!\d)(\d{1,2})[ _-]?steps?(?![a-z])", re.IGNORECASE)
_KIN = r"(?:sd[ _.-]?(?:xl|v?\d(?:\.\d)?)?|xl|lora|large|medium)"  # what stands beside such a word in a model's name
_GAP = r"[ _.-]*"
WORDS = {"lcm": "lcm", "hyper": "hyper", "turbo": "lightning|turbo"}
ALONE = ("lcm",)  # words that mean nothing else; `hyper-detailed` and `lightning-storm` are styles


def few_steps(lora: Lora, ways: Mapping[str, Mapping[str, Any]]) -> Wish:
    """How a LoRA that distils a model into few steps is drawn with, told by its name and its notes; of others nothing.

    A word tells that has a number of steps in the same text, or a model's name or `lora` beside it; `lcm` does alone.
    As many steps as the name says, else 4 (the models' published pages). One that says CFG leaves guidance as it is.
    """
    notes = ("modelspec.title", "ss_training_comment", "name", "ss_output_name")
    folder = lora.path.parent.name if lora.path.stem.startswith(("pytorch_lora", "adapter_")) else ""
    texts = [lora.name, lora.path.stem, folder, *(lora.metadata.get(note, "") for note in notes)]
    for way, word in WORDS.items():
        told = next((text for text in texts if way in ways and _tells(text, way, word)), None)
        if told is None:
            continue
        found = _STEPS.search(" ".join(texts))
        steps = int(found[1]) if found and int(found[1]) else 4
        own = dict(ways[way])
        if any(_says(text, "cfg") for text in texts):
            own.pop("guidance", None)
        # a file's own name may be nobody's business
        called = told == lora.name or told not in (lora.path.stem, folder)
        by = f"for it is called {shown(told)}" if called else "by its file's name"
        return Wish({"steps": steps, **own}, f"one made for few steps ({way}), {by}")
    return Wish()


def _tells(text: str, way: str, word: str) -> bool:
    if way in ALONE:
        return _says(text, word)
    beside = rf"{_KIN}{_GAP}(?:{word})|(?:{word}){_GAP}{_KIN}"
    return _says(text, beside) or (_says(text, word) and _STEPS.search(text) is not None)


def _says(text: str, words: str) -> bool:
    return re.search(rf"(?<![a-z])(?:{words})(?![a-z])", text, re.IGNORECASE) is not None
