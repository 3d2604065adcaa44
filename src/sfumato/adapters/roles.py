"""How the names of an adapter's tensors end: which module they belong to, and what they are of it.

Sources: kohya-ss/sd-scripts networks/lora.py; diffusers utils/state_dict_utils.py; huggingface/peft; LyCORIS,
lycoris/modules/*.py. Only text: nothing here needs a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

KOHYA, PEFT, DIFFUSERS, DIFFUSERS_OLD = "kohya", "PEFT", "diffusers", "diffusers (old)"
LOHA, LOKR, FULL, NORM = "LoHa", "LoKr", "full", "norm"
ANY = ""  # of a role that several formats share

# endings, first match first: pattern → (role, format). `(?P<name>…)` in PEFT is the adapter's name
ENDINGS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern + "$"), role, kind)
    for pattern, role, kind in (
        (r"\.lora_up\.weight", "up", KOHYA),
        (r"\.lora_down\.weight", "down", KOHYA),
        (r"\.lora_mid\.weight", "mid", KOHYA),
        (r"\.lora_B(\.[^.]+)?\.bias", "up_bias", PEFT),
        (r"\.lora_B(\.(?!weight$)[^.]+)?(\.weight)?", "up", PEFT),
        (r"\.lora_A(\.(?!weight$)[^.]+)?(\.weight)?", "down", PEFT),
        (r"\.lora_magnitude_vector(\.(?!weight$)[^.]+)?(\.weight)?", "magnitude", PEFT),
        (r"\.lora_linear_layer\.up\.weight", "up", DIFFUSERS),
        (r"\.lora_linear_layer\.down\.weight", "down", DIFFUSERS),
        (r"\.lora\.up\.weight", "up", DIFFUSERS),
        (r"\.lora\.down\.weight", "down", DIFFUSERS),
        (r"_lora\.up\.weight", "up", DIFFUSERS_OLD),
        (r"_lora\.down\.weight", "down", DIFFUSERS_OLD),
        *(
            (rf"\.{name}", name, LOHA)
            for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
        ),
        *(
            (rf"\.{name}", name, LOKR)
            for name in (
                *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
                *("lokr_t1", "lokr_t2"),
            )
        ),
        (r"\.diff", "diff", FULL),
        (r"\.diff_b", "diff_b", FULL),
        (r"\.w_norm", "diff", NORM),
        (r"\.b_norm", "diff_b", NORM),
        (r"\.dora_scale", "dora_scale", ANY),
        (r"\.alpha", "alpha", ANY),
        (r"\.scalar", "scalar", ANY),
    )
)
UNSUPPORTED = {  # endings of kinds that are told by name when they are refused
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "on_input": "IA3",
    "ia3_l": "IA3",
    "lora_E": "AdaLoRA",
    "vera_lambda_b": "VeRA",
}
BUNDLED = "bundle_emb."  # before textual inversions that A1111 reads from a LoRA's file
MARK = re.compile(r"\.processor(?=\.)|\.processor$")  # where diffusers once kept what acts in an attention


@dataclass(frozen=True)
class Spelled:
    """A module as a file spells it. tensors: role to the name of its tensor. formats: those of the roles."""

    module: str
    tensors: dict[str, str] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)


def split(name: str) -> tuple[str, str, str] | None:
    """(module, role, format) of a tensor's name; None where it ends like none of ours."""
    for ending, role, kind in ENDINGS:
        if found := ending.search(name):
            module = name[: found.start()]
            return MARK.sub("", module), role, kind
    return None


def group(names: Iterable[str]) -> tuple[dict[str, Spelled], list[str], list[str]]:
    """The modules of a file; the names that end like none of ours; and those that give a role of a module again."""
    modules: dict[str, Spelled] = {}
    unknown: list[str] = []
    again: list[str] = []
    for name in names:
        found = split(name)
        if found is None:
            unknown.append(name)
            continue
        module, role, kind = found
        spelled = modules.setdefault(module, Spelled(module))
        if role in spelled.tensors:
            again.append(name)
            continue
        spelled.tensors[role] = name
        if kind:
            spelled.formats.add(kind)
    return modules, unknown, again


def looks_like_one(names: Iterable[str]) -> bool:
    """Whether a file of these tensors is an adapter: it has at least one of the parts that only adapters have."""
    told = (split(name) for name in names)
    return any(found is not None and found[1] not in ("alpha", "scalar") for found in told)


def refused(name: str) -> str | None:
    """The kind of adapter that a name tells, of those that are known and not read."""
    return next((kind for ending, kind in UNSUPPORTED.items() if name.endswith("." + ending)), None)


def refused_among(names: Iterable[str]) -> str | None:
    """The kind that the first name tells which tells one."""
    return next((kind for name in names if (kind := refused(name))), None)
