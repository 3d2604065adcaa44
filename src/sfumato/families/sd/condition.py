"""Prompts, sizes and aesthetics to what a Stable Diffusion U-Net is told.

Which features of which encoder each family reads (sources: Stability-AI generative-models, configs/inference/*.yaml and
sgm/modules/encoders/modules.py; diffusers, `encode_prompt` of the pipelines):

    sd1           CLIP-L, last layer, final norm                                                     (B, N, 768)
    sd2           OpenCLIP-H of 23 layers (the 24th is left out), last layer, final norm             (B, N, 1024)
    sdxl          CLIP-L and OpenCLIP-bigG, the layer before the last, no norm, side by side         (B, N, 2048)
                  pooled: bigG's projected embedding                                                  (B, 1280)
    sdxl-refiner  bigG alone                                                                          (B, N, 1280)

`negative` None is "no negative prompt": SDXL was trained with features of zero there, and gets them, as in diffusers;
the others, the refiner among them, read the empty prompt. "" is the empty prompt for all: diffusers and ComfyUI do the
same, A1111 puts zeros for SDXL there too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.condition import TextFeatures, TextOptions, check_prompts, fit_inversion
from sfumato.nn.embed import sinusoid
from sfumato.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, ClipConfig, ClipTextEncoder
from sfumato.text.clip_tokens import EOS, ClipTokenizer, bundled
from sfumato.text.inversion import Inversion
from sfumato.text.syntax import parse
from sfumato.text.weighting import encode_windows
from sfumato.text.windows import Window, lay_out, level
from sfumato.types import Micro

SIZE_WIDTH = 256  # Fourier features of each number
AESTHETIC, NEGATIVE_AESTHETIC = 6.0, 2.5  # the refiner's scores, which run from 0 to 10


@dataclass(frozen=True)
class Reader:
    """One text encoder of a family. part: its folder's name; label: its vectors' in a textual inversion."""

    part: str
    config: ClipConfig
    pad: int | None  # id that fills a window after its end; None is the end mark itself
    label: str


@dataclass(frozen=True)
class TextPlan:
    """How a family reads prompts."""

    title: str  # the family in messages
    readers: tuple[Reader, ...]
    clip_skip: int = 1  # the layer read when a request names none, counted from the last
    final_norm: bool = True
    zero_negative: bool = False  # features of zero where there is no negative prompt
    numbers: int = 0  # sizes and scores beside the pooled embedding


PLANS = {
    "sd1": TextPlan("Stable Diffusion 1", (Reader("text_encoder", CLIP_L, None, "clip_l"),)),
    "sd2": TextPlan("Stable Diffusion 2", (Reader("text_encoder", OPENCLIP_H, 0, "clip_h"),)),
    "sdxl": TextPlan(
        "Stable Diffusion XL",
        (
            Reader("text_encoder", CLIP_L, None, "clip_l"),
            Reader("text_encoder_2", OPENCLIP_BIGG, 0, "clip_g"),
        ),
        clip_skip=2,
        final_norm=False,
        zero_negative=True,
        numbers=6,
    ),
    "sdxl-refiner": TextPlan(
        "Stable Diffusion XL's refiner",
        (Reader("text_encoder_2", OPENCLIP_BIGG, 0, "clip_g"),),
        clip_skip=2,
        final_norm=False,
        numbers=5,
    ),
}


def plan_of(kind: str) -> TextPlan:
    """How a kind of `SYSTEMS` reads prompts: "sdxl-inpaint" does as "sdxl"."""
    return PLANS[kind if kind in PLANS else kind.split("-")[0]]


@dataclass(frozen=True)
class TextStack:
    """A family's text encoders, each with its tokenizer and the textual inversions that fit it."""

    plan: TextPlan
    encoders: tuple[ClipTextEncoder, ...]
    tokenizers: tuple[ClipTokenizer, ...] = ()
    inversions: tuple[Mapping[str, Inversion], ...] = ()  # as `text.inversion.read_inversion` gives them

    def __post_init__(self) -> None:
        if not self.tokenizers:
            object.__setattr__(self, "tokenizers", tuple(bundled(reader.pad) for reader in self.plan.readers))
        if not len(self.plan.readers) == len(self.encoders) == len(self.tokenizers):
            raise InputError(f"{self.plan.title} has {len(self.plan.readers)} text encoders and tokenizers")
        _ = self.fitted  # an inversion of another family is refused now, not at the first prompt

    @cached_property
    def fitted(self) -> tuple[tuple[Inversion, ...], ...]:
        """For each encoder, the inversions it reads."""
        configs = [encoder.config for encoder in self.encoders]
        return fit(self.plan, configs, self.tokenizers, self.inversions)


def fit(
    plan: TextPlan,
    configs: Sequence[ClipConfig],
    tokenizers: Sequence[ClipTokenizer],
    inversions: Sequence[Mapping[str, Inversion]],
) -> tuple[tuple[Inversion, ...], ...]:
    """For each of a family's encoders, the inversions it reads.

    `CheckpointError` for tokenizers and inversions that do not go with the encoders, which need not be there yet.
    """
    for config, tokenizer in zip(configs, tokenizers, strict=True):
        if len(tokenizer) > config.vocabulary or tokenizer.eos != bundled().eos:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} ids and its end mark {EOS} is {tokenizer.eos}; the encoder "
                f"reads {config.vocabulary} ids, and {bundled().eos} as the end"
            )
    labels, widths = [reader.label for reader in plan.readers], [config.width for config in configs]
    rows = [fit_inversion(plan.title, labels, widths, found) for found in inversions]
    return tuple(zip(*rows, strict=True)) if rows else ((),) * len(configs)


def encode_prompts(
    stack: TextStack,
    prompts: Sequence[str],
    negatives: Sequence[str | None] | None = None,
    options: TextOptions | None = None,
) -> tuple[TextFeatures, TextFeatures | None]:
    """Features of the prompts and of their negatives, all of one number of windows.

    negatives: one for each prompt, None within it where a picture has none; None altogether where nothing guides away
    from them, and then no negative features come back. Prompts of one call should belong together: a shorter one gets
    empty windows, which are read (`text.windows.level`). Deterministic; on the encoders' device and in their precision.
    """
    options = TextOptions() if options is None else options
    check_prompts(prompts, negatives)
    plan, count = stack.plan, len(prompts)
    blank = [i for i, text in enumerate(negatives or ()) if text is None and plan.zero_negative]
    # a row that will be zero has its prompt's windows, which are encoded anyway
    texts = [*prompts, *(prompts[i] if i in blank else text or "" for i, text in enumerate(negatives or ()))]
    sections = [parse(text, options.rule) for text in texts]

    tokens, pooled = [], None
    for encoder, tokenizer, inversions in zip(stack.encoders, stack.tokenizers, stack.fitted, strict=True):
        rows: list[tuple[Window, ...]] = [
            lay_out(section, tokenizer, inversions, options.backtrack) for section in sections
        ]
        features, pooled = encode_windows(
            encoder,
            tokenizer,
            level(rows, tokenizer),
            clip_skip=plan.clip_skip if options.clip_skip is None else options.clip_skip,
            final_norm=plan.final_norm,
            weighting=options.weighs,
        )
        tokens.append(features)  # (B, 77·k, D of this encoder)
    joined = torch.cat(tokens, dim=-1)  # (B, 77·k, D); pooled is the last encoder's
    features = TextFeatures(joined, pooled)
    if negatives is None:
        return features, None
    positive, negative = features.parted(count)
    for row in blank:
        negative.tokens[row] = 0
        if negative.pooled is not None:
            negative.pooled[row] = 0
    return positive, negative


def check_texts(stack: TextStack, texts: Sequence[str], options: TextOptions) -> None:
    """`InputError` for texts that `encode_prompts` would not read."""
    for text in texts:
        section = parse(text, options.rule)
        for tokenizer, inversions in zip(stack.tokenizers, stack.fitted, strict=True):
            lay_out(section, tokenizer, inversions, options.backtrack)


# --- sizes, beside the pooled embedding --------------------------------------------------------------------------


def size_numbers(
    original: tuple[int, int], crop: tuple[int, int] = (0, 0), target: tuple[int, int] | None = None
) -> tuple[float, ...]:
    """SDXL's six numbers in pixels (Podell et al. 2023, sec. 2.2): original (h, w), crop (top, left), target (h, w).

    original: the training picture's size before scaling; crop: where its crop began; target: what is drawn, None the
    original.
    """
    return _finite("size", *original, *crop, *(original if target is None else target))


def score_numbers(
    original: tuple[int, int], crop: tuple[int, int] = (0, 0), aesthetic: float = AESTHETIC
) -> tuple[float, ...]:
    """The refiner's five numbers: original (h, w) and crop (top, left) in pixels, and an aesthetic score, 0 to 10.

    A negative prompt has `NEGATIVE_AESTHETIC`.
    """
    return _finite("size", *original, *crop, aesthetic)


def micro_numbers(
    count: int, size: tuple[int, int], micro: Micro
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers of a picture of `size` (width, height), and those of its negative prompt. count: 6 or 5 of them."""
    original, crop, target = micro.original or size, micro.crop or (0, 0), micro.target or size
    score = AESTHETIC if micro.aesthetic is None else micro.aesthetic
    negative_original, negative_crop = micro.negative_original or original, micro.negative_crop or crop
    negative_target = micro.negative_target or target
    negative_score = NEGATIVE_AESTHETIC if micro.negative_aesthetic is None else micro.negative_aesthetic
    if count == 6:
        return (
            size_numbers(_rows_first(original), _rows_first(crop), _rows_first(target)),
            size_numbers(
                _rows_first(negative_original), _rows_first(negative_crop), _rows_first(negative_target)
            ),
        )
    return (
        score_numbers(_rows_first(original), _rows_first(crop), score),
        score_numbers(_rows_first(negative_original), _rows_first(negative_crop), negative_score),
    )


def _rows_first(pair: tuple[int, int]) -> tuple[int, int]:
    """(width, height) → (height, width), and (left, top) → (top, left)."""
    return pair[1], pair[0]


def size_vector(pooled: Tensor, numbers: Iterable[float]) -> Tensor:
    """pooled (B, P) → (B, P + 256·n) float32: the embedding, then 256 Fourier features, cosines first, of each number.

    The numbers stay float32 throughout: bfloat16 has no 1023, float16 no 2049.
    """
    values = torch.tensor(tuple(numbers), dtype=torch.float32, device=pooled.device)  # (n,)
    features = sinusoid(values, SIZE_WIDTH).flatten()  # (256·n,)
    return torch.cat([pooled.float(), features.expand(len(pooled), -1)], dim=1)


def _finite(argument: str, *numbers: float) -> tuple[float, ...]:
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise InputError(
                f"sizes, crops and scores must be finite numbers, not {number!r}", argument=argument
            )
    return tuple(map(float, numbers))
