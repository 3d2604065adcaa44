"""Prompts to what Stable Diffusion 3's transformer is told (Esser et al. 2024, 2403.03206, sec. 4 and app. B.3).

    clip_l   CLIP-L            the layer before the last, no norm   (B, 77·k, 768)    pooled, projected (B, 768)
    clip_g   OpenCLIP-bigG     the layer before the last, no norm   (B, 77·k, 1280)   pooled, projected (B, 1280)
    t5       T5 v1.1 XXL       the last layer, final norm           (B, n, 4096)

    tokens (B, 77·k + n, 4096): CLIP's features side by side, filled up with zeros; after them T5's.
    pooled (B, 2048): both embeddings side by side.

n is 256, as in diffusers, unless a request says otherwise; padding is read, no mask is told (diffusers,
pipeline_stable_diffusion_3.py, `encode_prompt`). A longer prompt gets the CLIP windows and the T5 tokens that it needs.
"No negative prompt" is the empty one.

An encoder that is left out leaves zeros in its place: so training dropped each of the three, with probability 0.463.
For T5 that is what diffusers does, with n tokens of zeros; for one of the CLIPs what ComfyUI does. Where they part:
ComfyUI tells no T5 tokens at all without T5, and no CLIP tokens without both CLIPs.

Nothing tells the transformer where a token of a text stands. So n tokens of zeros, of T5 or of both CLIPs, remain alike
from block to block, and on a CPU they are told as two that count for all: the same answer for a sixth less work at
512². On a GPU, whose fastest attention takes no such counts, they are told one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.condition import TextFeatures, TextOptions, check_prompts, fit_inversion
from sfumato.nn.attention import as_two
from sfumato.text.clip_tokens import ClipTokenizer
from sfumato.text.inversion import Inversion
from sfumato.text.syntax import Sections, parse
from sfumato.text.t5 import T5Encoder
from sfumato.text.t5_tokens import LENGTH, T5Tokenizer
from sfumato.text.t5_tokens import lay_out as lay_out_t5
from sfumato.text.weighting import Hidden, encode_rows, encode_windows, ids_of, visible_of
from sfumato.text.windows import LENGTH as WINDOW
from sfumato.text.windows import Window, lay_out, level

TITLE = "Stable Diffusion 3"
CLIP_SKIP = 2  # the layer before the last


@dataclass(frozen=True)
class Reader:
    """A text encoder. name: users' for it; part: its folder's; title: in messages; pad: as for `ClipTokenizer`."""

    name: str
    part: str
    title: str
    pad: int | None = None


READERS = (
    Reader("clip_l", "text_encoder", "CLIP-L"),
    Reader("clip_g", "text_encoder_2", "CLIP-G", pad=0),
    Reader("t5", "text_encoder_3", "T5"),
)


@dataclass(frozen=True)
class TextShape:
    """What the encoders' features measure, there or left out. joint: of a token that the transformer reads."""

    clip: tuple[int, int] = (768, 1280)
    pooled: tuple[int, int] = (768, 1280)
    joint: int = 4096


@dataclass(frozen=True)
class TextStack:
    """The text encoders that are read, by their parts' names.

    encoders: a part's encoder, opened when it is asked for. One is asked for when the one before has answered and is
    not held here any more, so that a mapping which keeps the last alone has no two in memory. tokenizers: of the parts
    that are read; for the others there are zeros. inversions: as `text.inversion.read_inversion` gives them; the CLIPs
    read their vectors, T5 their names as they are written.
    """

    encoders: Mapping[str, Any]
    tokenizers: Mapping[str, ClipTokenizer | T5Tokenizer]
    shape: TextShape = TextShape()
    inversions: tuple[Mapping[str, Inversion], ...] = ()

    def __post_init__(self) -> None:
        known = {reader.part for reader in READERS}
        if not self.tokenizers or not self.tokenizers.keys() <= known:
            raise InputError(f"text encoders are some of {', '.join(sorted(known))}")
        _ = self.fitted  # an inversion of another family is refused now, not at the first prompt

    @cached_property
    def fitted(self) -> dict[str, tuple[Inversion, ...]]:
        """By part of each CLIP, the inversions that it reads."""
        return fit(self.shape, self.inversions)


def fit(shape: TextShape, inversions: Sequence[Mapping[str, Inversion]]) -> dict[str, tuple[Inversion, ...]]:
    """By part of each CLIP, its vectors of each inversion. `CheckpointError` for one made for other encoders."""
    *clips, _ = READERS
    labels = [clip.name for clip in clips]
    rows = [fit_inversion(TITLE, labels, shape.clip, found) for found in inversions]
    return {clip.part: tuple(row[place] for row in rows) for place, clip in enumerate(clips)}


def readers_of(there: Collection[str], without: Iterable[str], name: str) -> tuple[Reader, ...]:
    """The encoders to read of a checkpoint `name` that has the parts `there`, without those that a user leaves out.

    `InputError` for the name of no encoder, and where none is left; `CheckpointError` for one that is missing and not
    left out, which says how to do either.
    """
    without = tuple(without)
    known = [reader.name for reader in READERS]
    for other in without:
        if other not in known:
            raise InputError(
                f"this model has no text encoder {other!r} to leave out; it has {', '.join(known)}",
                argument="without",
            )
    wanted = tuple(reader for reader in READERS if reader.name not in without)
    if not wanted:
        raise InputError("all text encoders are left out; leave one in", argument="without")
    missing = [reader for reader in wanted if reader.part not in there]
    if missing:
        flags = " ".join(f"--without {reader.name}" for reader in missing)
        raise CheckpointError(
            f"{name} holds no {' and no '.join(reader.title for reader in missing)}; give "
            f"{'its file' if len(missing) == 1 else 'their files'} by --parts, or leave out by {flags}"
        )
    return wanted


def encode_prompts(
    stack: TextStack,
    prompts: Sequence[str],
    negatives: Sequence[str | None] | None = None,
    options: TextOptions | None = None,
) -> tuple[TextFeatures, TextFeatures | None]:
    """Features of the prompts and of their negatives, all of one number of tokens.

    negatives: one for each prompt, None within it for the empty text; None altogether where nothing guides away from
    them, and then no negative features come back. Prompts of one call should belong together, since a shorter one is
    filled up to the longest. Deterministic; float32, on the encoders' device.
    """
    options = TextOptions() if options is None else options
    check_prompts(prompts, negatives)
    texts = [*prompts, *(text or "" for text in negatives or ())]
    features = encode(stack, [parse(text, options.rule) for text in texts], options)
    return (features, None) if negatives is None else features.parted(len(prompts))


def extent(stack: TextStack, sections: Sequence[Sections], options: TextOptions) -> tuple[int, int]:
    """How many windows of the CLIPs and tokens of T5 parsed prompts need together."""
    rows, t5_rows = _laid_out(stack, sections, options)
    windows = max((len(row) for part in rows.values() for row in part), default=1)
    return windows, len(t5_rows[0].ids) if t5_rows else _length(options)


def encode(
    stack: TextStack, sections: Sequence[Sections], options: TextOptions, windows: int = 1
) -> TextFeatures:
    """Features of parsed prompts. windows: of the CLIPs, at least. With gradients, where the encoders have any."""
    *clips, t5 = READERS
    # every window is laid out before an encoder is opened: a prompt that cannot be read costs nothing
    rows, t5_rows = _laid_out(stack, sections, options)
    windows = max([windows, *(len(row) for part in rows.values() for row in part)])

    found: list[Tensor | None] = []
    pooled: list[Tensor | None] = []
    for clip in clips:
        if clip.part not in rows:
            found.append(None)
            pooled.append(None)
            continue
        tokenizer = stack.tokenizers[clip.part]
        assert isinstance(tokenizer, ClipTokenizer)
        features, embedding = encode_windows(
            stack.encoders[clip.part],
            tokenizer,
            level(rows[clip.part], tokenizer, windows),
            clip_skip=CLIP_SKIP if options.clip_skip is None else options.clip_skip,
            final_norm=False,
            weighting=options.weighs,
        )
        found.append(features)  # (B, 77·k, D of this encoder)
        pooled.append(embedding)
    last = (
        None
        if not t5_rows
        else _encode_t5(stack.encoders[t5.part], stack.tokenizers[t5.part], t5_rows, options)
    )

    there = next(tensor for tensor in (*found, last) if tensor is not None)
    count, shape = len(sections), stack.shape

    def filled(tensor: Tensor | None, *size: int) -> Tensor:
        if tensor is None:
            return torch.zeros(count, *size, device=there.device)
        return tensor.float().to(there.device)

    of_clips = None
    if any(one is not None for one in found):
        sides = [filled(one, WINDOW * windows, width) for one, width in zip(found, shape.clip, strict=True)]
        of_clips = torch.cat(sides, dim=-1)  # (B, 77·k, 2048)
        of_clips = functional.pad(of_clips, (0, shape.joint - of_clips.shape[-1]))
    tokens, counts = [], []
    for part, length in ((of_clips, WINDOW * windows), (last, _length(options))):
        alike = part is None and there.device.type == "cpu"
        tokens.append(filled(part, 2 if alike else length, shape.joint))
        counts += as_two(length) if alike else [1.0] * tokens[-1].shape[1]
    mask = None if set(counts) == {1.0} else torch.tensor(counts, device=there.device).expand(count, -1)
    vectors = [filled(one, width) for one, width in zip(pooled, shape.pooled, strict=True)]
    return TextFeatures(torch.cat(tokens, dim=1), torch.cat(vectors, dim=-1), mask)


def _laid_out(
    stack: TextStack, sections: Sequence[Sections], options: TextOptions
) -> tuple[dict[str, list[tuple[Window, ...]]], list[Window]]:
    """By part the windows of each CLIP that is read, for each prompt; and T5's rows, none where it is left out."""
    *clips, t5 = READERS
    rows = {
        clip.part: [
            lay_out(prompt, tokenizer, stack.fitted[clip.part], options.backtrack) for prompt in sections
        ]
        for clip in clips
        if isinstance(tokenizer := stack.tokenizers.get(clip.part), ClipTokenizer)
    }
    tokenizer = stack.tokenizers.get(t5.part)
    t5_rows = [] if tokenizer is None else lay_out_t5(sections, tokenizer, _length(options))
    return rows, t5_rows


def _length(options: TextOptions) -> int:
    return LENGTH if options.length is None else options.length


def _encode_t5(encoder: T5Encoder, tokenizer: Any, rows: Sequence[Window], options: TextOptions) -> Tensor:
    """(B, n, 4096)."""

    def encode(rows: Sequence[Window], hidden: Hidden) -> tuple[Tensor, None]:
        device = encoder.device
        return encoder(ids_of(rows, device), visible_of(rows, hidden, device)), None

    nothing = lay_out_t5([((),)], tokenizer, len(rows[0].ids))[0]
    return encode_rows(encode, nothing, [(row,) for row in rows], options.weighs)[0]
