"""Textual inversion: words learnt as vectors, which stand in a prompt where their trigger does (Gal et al. 2022).

Files, all safetensors:

    `emb_params` (n, D)                   AUTOMATIC1111's
    `clip_l` (n, 768), `clip_g` (n, 1280)  for a model of two encoders; either may be alone
    one tensor of any other name           diffusers' save: the name is the token, as in `<cat-toy>`; (n, D) or (D,)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import CheckpointError, InputError
from sfumato.storage import data_hash, load_tensors
from sfumato.text.clip_tokens import ClipTokenizer

UNLABELLED = ""  # the encoder of a file that does not say which
LABELS = ("clip_l", "clip_g")
A1111_KEY = "emb_params"


@dataclass(frozen=True, eq=False)  # compared as the object it is: tensors have no truth
class Inversion:
    """Vectors for one encoder. triggers: texts that call them; vectors: (n, D) float32, n tokens of width D.

    digest: `storage.data_hash` of the file, "" where there was none.
    """

    name: str
    triggers: tuple[str, ...]
    vectors: Tensor
    digest: str = ""

    def __len__(self) -> int:
        return self.vectors.shape[0]

    @property
    def width(self) -> int:
        return self.vectors.shape[1]


def read_inversions(
    files: Iterable[str | Path] | Mapping[str, str | Path],
) -> dict[str, dict[str, Inversion]]:
    """`read_inversion` of each file, by the file's name or the one given to it. `InputError` for a name given twice."""
    if isinstance(files, str | os.PathLike):
        files = [files]
    given = files.items() if isinstance(files, Mapping) else ((None, file) for file in files)
    found: dict[str, dict[str, Inversion]] = {}
    for name, file in given:
        path = Path(file)
        name = path.stem if name is None else name
        if name in found:
            raise InputError(
                f"two embeddings are called {name!r}; give one of them another name", argument="embedding"
            )
        found[name] = read_inversion(path, name)
    return found


def read_inversion(path: Path, name: str | None = None) -> dict[str, Inversion]:
    """The file's vectors by encoder: under "clip_l" and "clip_g", or under "" where it does not say.

    The trigger is `name`, by default the file's without `.safetensors`; the token that diffusers saved is a second one.
    `CheckpointError` for a pickled or damaged file, other tensors, other shapes, and numbers that are not finite.
    """
    tensors = load_tensors(path)
    name, digest = path.stem if name is None else name, data_hash(path)
    labelled = set(tensors) <= set(LABELS)
    if not tensors or (len(tensors) > 1 and not labelled):
        shown = ", ".join(sorted(tensors)[:10]) or "nothing"
        raise CheckpointError(
            f"{path} is not a textual inversion: it holds {shown}; "
            f"{A1111_KEY}, clip_l and clip_g, or one token is expected"
        )
    counts = {tensor.shape[0] if tensor.ndim == 2 else 1 for tensor in tensors.values()}
    if len(counts) > 1:
        raise CheckpointError(f"{path} holds different numbers of vectors for clip_l and clip_g")
    found = {}
    for key, tensor in tensors.items():
        vectors = tensor[None] if tensor.ndim == 1 else tensor
        if vectors.ndim != 2 or not vectors.numel() or not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {key} must hold vectors, (n, D) numbers, not {tuple(tensor.shape)} {tensor.dtype}"
            )
        if not torch.isfinite(vectors).all():
            raise CheckpointError(f"{path}: {key} holds numbers that are not finite")
        triggers = (name,) if labelled or key in (A1111_KEY, name) else (name, key)
        found[key if labelled else UNLABELLED] = Inversion(name, triggers, vectors.float(), digest)
    return found


Triggers = Mapping[int, Sequence[tuple[tuple[int, ...], Inversion]]]


def trigger_table(inversions: Iterable[Inversion], tokenizer: ClipTokenizer) -> Triggers:
    """First id of a trigger → the triggers that begin with it, as ids, the longest first.

    A trigger is found by its tokens, so letter case and white space do not matter; ComfyUI's `embedding:name` counts as
    well. `InputError` when two inversions share a trigger, or one is no text at all.
    """
    taken: dict[tuple[int, ...], Inversion] = {}
    for inversion in inversions:
        for trigger in inversion.triggers:
            for spelling in (trigger, f"embedding:{trigger}"):
                ids = tuple(tokenizer.encode(spelling))
                if not tokenizer.encode(trigger):
                    raise InputError(f"the textual inversion {trigger!r} needs a name of visible characters")
                if taken.setdefault(ids, inversion) is not inversion:
                    raise InputError(
                        f"two textual inversions are called by {trigger!r}; rename one of the files"
                    )
    table: dict[int, list[tuple[tuple[int, ...], Inversion]]] = {}
    for ids, inversion in sorted(taken.items(), key=lambda item: -len(item[0])):
        table.setdefault(ids[0], []).append((ids, inversion))
    return table
