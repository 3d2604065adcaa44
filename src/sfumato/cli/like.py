"""`--like`: what a picture says of its making, and what stands between it and a new one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.generate import Model
    from sfumato.receipts.provenance import Like
    from sfumato.types import Request


def read(like: Path, given: dict[str, Any], dropped: set[str], refiner: str | None) -> Like:
    """What the picture `like` says of its making, without what was `dropped`. The pictures that it began with must be
    among those `given`, and a refiner there must be."""
    from dataclasses import replace

    from sfumato.receipts.provenance import read_like

    said = read_like(like, {*given, *dropped})
    fields = said.request
    began_with_one = {"image", "strength", "mask", "inpaint", "outpaint"} & fields.keys()
    if began_with_one and "image" not in given:
        raise InputError(
            f"{like} began with another picture; give that one, or a new one, by --image", argument="image"
        )
    painted = "mask" in fields or ("inpaint" in fields and "outpaint" not in fields)
    if painted and "mask" not in given:
        raise InputError(
            f"{like} was painted inside a mask; give it, or a new one, by --mask", argument="mask"
        )
    if "refine_at" in fields and refiner is None:
        raise InputError(
            f"{like} was finished by the refiner {said.refiner!r}; give it, or a new one, by --refiner, or leave it "
            "out by --refiner none",
            argument="refiner",
        )
    return replace(said, request={name: value for name, value in fields.items() if name not in dropped})


def differences(like: Path, said: Like, loaded: Model, request: Request) -> list[str]:
    """What stands between a new picture and the one it is to be like, a sentence each."""
    notes: list[str] = []
    if said.weights is not None:
        notes += _weights(f"{like} was drawn", said.weights, loaded.hashes, f"the model {said.model!r}", "-m")
    elif said.model is not None:
        notes.append(f"{like} was drawn by the model {said.model!r}; this one is {loaded.name!r}")
    if loaded.refiner is not None and said.refiner_weights is not None:
        of = said.refiner_weights, loaded.refiner.hashes
        notes += _weights(f"{like} was finished", *of, f"the refiner {said.refiner!r}", "--refiner")
    for name, value in said.read_as.items():
        if (taken := loaded.system.read_as.get(name, value)) != value:
            notes.append(f"{like} was drawn with the {name} {value!r} and not {taken!r}; give it by --{name}")
    ours, theirs = set(loaded.without), set(said.without)
    if said.weights is not None and ours != theirs:
        more = [f"with {name}" for name in sorted(ours - theirs)]
        notes.append(
            f"{like} was drawn {' and '.join([*more, *(f'without {name}' for name in sorted(theirs - ours))])}; "
            "text encoders are left out by --without NAME"
        )
    for name in said.embeddings.keys() - loaded.embeddings.keys():
        notes.append(f"{like} was drawn with the embedding {name!r}; give its file by --embedding")
    adapters = loaded.lora_digests(request)
    controlnets = loaded.system.control_hashes() if said.controlnets and request.controls else {}
    annotators = {name: each.digest for name, each in loaded.annotators.items()}
    for what, before, now in (
        ("embedding", said.embeddings, loaded.embeddings),
        ("LoRA", said.loras, adapters),
        ("ControlNet", said.controlnets, controlnets),
        ("annotator", said.annotators, annotators),
    ):
        for name in before.keys() & now.keys():
            if not now[name].startswith(before[name]):
                notes.append(f"{like} was drawn with another {what} {name!r} than this file's")
    if said.ignored:
        notes.append(f"not taken over from {like}: {', '.join(said.ignored)}")
    return notes


def _weights(what: str, said: dict[str, str], ours: dict[str, str], model: str, option: str) -> list[str]:
    """Whose weights differ: another model's, or a part's of the same. A part that only one side names is none."""
    other = [part for part, digest in said.items() if ours.get(part, digest) != digest]
    if not said.keys() & ours.keys() or "denoiser" in other:
        return [f"{what} by other weights, of {model}; choose the model by {option}"]
    if other:
        by = "; give it by --vae" if "autoencoder" in other else ""
        return [f"{what} with other weights of {' and '.join(other)}, by {model}{by}"]
    return []
