"""How Stable Diffusion 3's text encoders and their tokenizers are made from a checkpoint: in which type, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.adapters.fold import Touched
from sfumato.checkpoint.refill import refill, refill_layers
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.folder import tokenizer_folder
from sfumato.families.published.kinds import TextConfig
from sfumato.families.published.openers import blank
from sfumato.families.published.text import open_clip, open_t5, t5_dtype, t5_form, tokenizer_of
from sfumato.families.sd3.condition import READERS, Reader
from sfumato.text.clip_tokens import ClipTokenizer
from sfumato.text.t5 import T5_XXL, T5Config
from sfumato.text.t5_tokens import T5Tokenizer, find, open_file

CACHED = (  # repositories whose copy in the Hub's cache has T5's tokenizer
    ("stabilityai/stable-diffusion-3.5-medium", "tokenizer_3/tokenizer.json"),
    ("stabilityai/stable-diffusion-3.5-large", "tokenizer_3/tokenizer.json"),
    ("stabilityai/stable-diffusion-3.5-large-turbo", "tokenizer_3/tokenizer.json"),
    ("stabilityai/stable-diffusion-3-medium-diffusers", "tokenizer_3/tokenizer.json"),
    ("google/t5-v1_1-xxl", "spiece.model"),
)


def text_openers(
    readers: Sequence[Reader],
    configs: Mapping[str, TextConfig],
    parts: Mapping[str, Mapping[str, Tensor]],
    sources: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    text_dtype: torch.dtype | None = None,
    stream: bool = False,
) -> dict[str, Callable[[], Any]]:
    """How each encoder is made from its part's tensors, which are read then, in the order in which prompts need them.

    configs: by part. dtype: of the CLIPs, and of T5 unless text_dtype says otherwise: int8 keeps T5's products in eight
    bits and the rest in bfloat16; float16, which T5 overflows, becomes bfloat16. stream: T5's layers are read whenever
    it is called.
    """
    made: dict[str, Callable[[], Any]] = {}
    for reader in readers:
        config, tensors, where = configs[reader.part], parts[reader.part], sources[reader.part]
        if isinstance(config, T5Config):
            form = (t5_dtype(dtype if text_dtype is None else text_dtype), device)
            made[reader.part] = partial(open_t5, config, tensors, where, *form, stream=stream)
        else:
            made[reader.part] = partial(open_clip, config, tensors, where, dtype, device)
    return made


def text_renewers(
    readers: Sequence[Reader],
    configs: Mapping[str, TextConfig],
    parts: Mapping[str, Mapping[str, Tensor]],
    sources: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    text_dtype: torch.dtype | None = None,
) -> dict[str, Callable[[Any, Touched], bool]]:
    """How each encoder that `text_openers` made takes over tensors of its part that have changed."""

    def renewer(part: str, config: TextConfig) -> Callable[[Any, Touched], bool]:
        def renew(encoder: Any, touched: Touched) -> bool:
            names, tensors, where = touched.get(part, frozenset()), parts[part], sources[part]
            if isinstance(config, T5Config):
                kept, twin = t5_form(t5_dtype(dtype if text_dtype is None else text_dtype))
                ways: dict[str, Any] = {} if twin is None else {"twin": lambda path, layer: twin(layer)}
                refill_layers(encoder, blank(config), tensors, names, where, kept, device, **ways)
            else:
                refill(encoder, tensors, names, where)
            return True

        return renew

    return {reader.part: renewer(reader.part, configs[reader.part]) for reader in readers}


def tokenizers_of(
    readers: Sequence[Reader],
    folder: Path | None,
    name: str,
    *,
    file: Path | None = None,
    given: Path | None = None,
    vocabulary: int = T5_XXL.vocabulary,
) -> dict[str, ClipTokenizer | T5Tokenizer]:
    """A tokenizer for each encoder: the folder's own, the bundled one for a CLIP, and for T5 what can be found.

    folder: of a diffusers model; file: a single file, beside which a tokenizer may lie; given: the user's own. `name`
    stands for the checkpoint in errors. `CheckpointError` where T5 has none, or another model's.
    """
    if given is not None and all(reader.part != READERS[-1].part for reader in readers):
        raise InputError(
            f"{given} is for T5, which is left out here; leave out the tokenizer too", argument="tokenizer"
        )
    made: dict[str, ClipTokenizer | T5Tokenizer] = {}
    for reader in readers:
        if reader.part == READERS[-1].part:
            place = None if folder is None else folder / tokenizer_folder(reader.part)
            made[reader.part] = _t5_tokenizer(place, name, file, given, vocabulary)
        else:
            made[reader.part] = tokenizer_of(folder, reader.part, reader.pad)
    return made


def _t5_tokenizer(
    place: Path | None, name: str, file: Path | None, given: Path | None, vocabulary: int
) -> T5Tokenizer:
    if given is not None:
        path = find([given])
        if path is None:
            raise InputError(
                f"{given} is no tokenizer of T5; give its tokenizer.json or spiece.model, or their folder",
                argument="tokenizer",
            )
    else:
        beside = [] if file is None else [file.parent / "tokenizer_3", file.parent]
        places = beside if place is None else [place]
        path = find([*places, *_cached()])
        if path is None:
            raise CheckpointError(
                f"{name} has T5 but no tokenizer for it: put T5's tokenizer.json (tokenizer_3/ of any Stable Diffusion "
                f"3 repository) into {places[0]}, name the file by --tokenizer, or leave T5 out by --without t5"
            )
    tokenizer = open_file(path)
    if len(tokenizer) > vocabulary:
        raise CheckpointError(f"{path} has {len(tokenizer)} ids; T5's encoder here reads {vocabulary}")
    return tokenizer


def _cached() -> Iterator[Path]:
    """T5's tokenizers in the Hub's cache on this machine; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    for repository, file in CACHED:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            yield Path(found)
