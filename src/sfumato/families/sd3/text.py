"""How Stable Diffusion 3's text encoders and their tokenizers are made from a checkpoint: in which type, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoint.fill import fill_layers
from sfumato.errors import CheckpointError, InputError
from sfumato.families.clip import load_encoder, tokenizer_of
from sfumato.families.published.folder import tokenizer_folder
from sfumato.families.sd3.condition import READERS, Reader
from sfumato.nn.narrow import narrowed
from sfumato.text.clip import OPENCLIP_BIGG, PROJECTION, ClipConfig, ClipTextEncoder
from sfumato.text.clip_tokens import ClipTokenizer
from sfumato.text.t5 import T5_XXL, T5Config, T5Encoder
from sfumato.text.t5_tokens import T5Tokenizer, describe_missing, find, open_file

# CLIP-L's embedding is projected too; single files leave the matrix out, which is that of no change
CLIP_L = ClipConfig(768, 12, 12, "quick_gelu", projection=768)
CONFIGS: Mapping[str, ClipConfig | T5Config] = {
    "text_encoder": CLIP_L,
    "text_encoder_2": OPENCLIP_BIGG,
    "text_encoder_3": T5_XXL,
}
PREFIXES = ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "transformer.")  # of T5 in files
TABLE, TWIN = "shared.weight", "encoder.embed_tokens.weight"  # the same numbers; files have one or both
CACHED = (  # repositories whose copy in the Hub's cache has T5's tokenizer
    ("stabilityai/stable-diffusion-3.5-medium", "tokenizer_3/tokenizer.json"),
    ("stabilityai/stable-diffusion-3.5-large", "tokenizer_3/tokenizer.json"),
    ("stabilityai/stable-diffusion-3.5-large-turbo", "tokenizer_3/tokenizer.json"),
    ("stabilityai/stable-diffusion-3-medium-diffusers", "tokenizer_3/tokenizer.json"),
    ("google/t5-v1_1-xxl", "spiece.model"),
)


def text_openers(
    readers: Sequence[Reader],
    parts: Mapping[str, Mapping[str, Tensor]],
    sources: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    configs: Mapping[str, ClipConfig | T5Config] = CONFIGS,
    text_dtype: torch.dtype | None = None,
    stream: bool = False,
) -> dict[str, Callable[[], Any]]:
    """How each encoder is made from its part's tensors, which are read then, in the order in which prompts need them.

    dtype: of the CLIPs, and of T5 unless text_dtype says otherwise: int8 keeps T5's products in eight bits and the
    rest in bfloat16; float16, which T5 overflows, becomes bfloat16. stream: T5's layers are read whenever it is called.
    """
    made: dict[str, Callable[[], Any]] = {}
    for reader in readers:
        config, tensors, where = configs[reader.part], parts[reader.part], sources[reader.part]
        if isinstance(config, T5Config):
            form = (t5_dtype(dtype if text_dtype is None else text_dtype), device)
            made[reader.part] = partial(open_t5, config, tensors, where, *form, stream=stream)
        else:
            made[reader.part] = partial(open_clip_encoder, config, tensors, where, dtype, device)
    return made


def t5_dtype(dtype: torch.dtype) -> torch.dtype:
    """What T5 is kept in where `dtype` is asked for."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        raise InputError(
            f"text encoders are kept in float32, bfloat16 or int8, not {str(dtype).removeprefix('torch.')}",
            argument="text_dtype",
        )
    return torch.bfloat16 if dtype == torch.float16 else dtype


def open_clip_encoder(
    config: ClipConfig, tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype, device: torch.device
) -> ClipTextEncoder:
    """One of the CLIPs. A file without the projection has that of no change, where widths allow."""
    if config.projection == config.width and PROJECTION not in tensors:
        tensors = _Projected(tensors, config.width)
    return load_encoder(config, tensors, dtype, where, device)


def open_t5(
    config: T5Config,
    tensors: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    stream: bool = False,
) -> T5Encoder:
    """T5's encoder in float32, bfloat16, or with int8 products, which no layer enters memory without.

    tensors: with the names of a model folder or those of a single file. `CheckpointError`, in which `where` stands for
    the file, when it is not T5's, or damaged.
    """
    if stream and dtype == torch.int8:
        raise InputError(
            "int8 rounds the weights once, and sequential reads them anew: choose one", argument="text_dtype"
        )
    with torch.device("meta"):
        encoder = T5Encoder(config)
    narrow = dtype == torch.int8
    kept = torch.bfloat16 if narrow else dtype
    named = t5_named(tensors)
    fill_layers(encoder, named, where, kept, device, stream=stream, twin=narrowed if narrow else None)
    encoder.device = device
    return encoder.eval().requires_grad_(False)


def t5_named(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors under the names of T5's encoder, each still read when it is asked for."""
    names: dict[str, str] = {}
    for key in tensors:
        prefix = next((p for p in PREFIXES if key.startswith(p)), "")
        names[key.removeprefix(prefix)] = key
    if TWIN in names:
        twin = names.pop(TWIN)
        names.setdefault(TABLE, twin)
    return _Renamed(tensors, names)


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
            raise CheckpointError(describe_missing(name, places[:1]))
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


class _Renamed(Mapping[str, Tensor]):
    """Other names for tensors that are read when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]):
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:  # the one of `Mapping` would read the tensor
        return name in self.names


class _Projected(_Renamed):
    """Tensors and a projection that changes nothing."""

    def __init__(self, tensors: Mapping[str, Tensor], width: int):
        super().__init__(tensors, {name: name for name in (*tensors, PROJECTION)})
        self.width = width

    def __getitem__(self, name: str) -> Tensor:
        return torch.eye(self.width) if name == PROJECTION else self.tensors[name]
