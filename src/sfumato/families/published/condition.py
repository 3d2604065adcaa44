"""How prompts are read, and what comes of them: the same for every family, whatever encoders it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.errors import CheckpointError, InputError
from sfumato.families.lora import BOTH, CONTEXTS, TITLES
from sfumato.text.inversion import LABELS, UNLABELLED, Inversion
from sfumato.text.syntax import rule_named
from sfumato.text.weighting import weighting_named
from sfumato.text.windows import BACKTRACK
from sfumato.types import MAX_TEXT_LENGTH as MOST


@dataclass(frozen=True)
class TextOptions:
    """How prompts are read. rule: of `text.syntax`; weighting: of `text.weighting`, None takes the rule's own.

    clip_skip: the layer read of CLIPs, 1 the last, 2 the one before …; None takes the family's. backtrack: tokens that
    may move to the next window with the text after a comma, 0 to 74. length: T5's tokens, at least; None takes the
    family's.
    """

    rule: str = "a1111"
    weighting: str | None = None
    clip_skip: int | None = None
    backtrack: int = BACKTRACK
    length: int | None = None

    def __post_init__(self) -> None:
        rule_named(self.rule)
        if self.weighting is not None:
            weighting_named(self.weighting)
        if self.length is not None and not 1 <= self.length <= MOST:
            raise InputError(
                f"text_length must be from 1 to {MOST} tokens of T5, not {self.length}",
                argument="text_length",
            )

    @classmethod
    def of(cls, request: Any) -> TextOptions:
        """Those of a request."""
        rule = request.prompt_rules or "a1111"
        return cls(rule, request.weighting, request.clip_skip, length=request.text_length)

    @property
    def weighs(self) -> str:
        """The name of the weighting that holds."""
        return self.rule if self.weighting is None else self.weighting


@dataclass(frozen=True)
class TextFeatures:
    """tokens: (B, N, D). pooled: (B, P), or None where the family has none. mask: (B, N), how many equal tokens each
    one stands for; None is one each.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def parted(self, count: int) -> tuple[TextFeatures, TextFeatures]:
        """The first `count` rows, and the others."""
        return self._rows(slice(count)), self._rows(slice(count, None))

    def _rows(self, rows: slice) -> TextFeatures:
        pooled, mask = (None if tensor is None else tensor[rows] for tensor in (self.pooled, self.mask))
        return TextFeatures(self.tokens[rows], pooled, mask)


def check_prompts(prompts: Sequence[str], negatives: Sequence[str | None] | None) -> None:
    """`InputError` unless there are prompts, and as many negatives, if any."""
    if not prompts:
        raise InputError("give at least one prompt", argument="prompts")
    if negatives is not None and len(negatives) != len(prompts):
        raise InputError(
            f"{len(prompts)} prompts need as many negatives, not {len(negatives)}", argument="negatives"
        )


def fit_inversion(
    title: str, labels: Sequence[str], widths: Sequence[int], found: Mapping[str, Inversion]
) -> tuple[Inversion, ...]:
    """A textual inversion's vectors for each of a family's encoders, of these labels and widths.

    `CheckpointError` names the family that they were made for. title: ours in it.
    """
    name = next(iter(found.values())).name
    chosen = []
    if LABELS[1] in labels or LABELS[1] not in found:  # vectors for two encoders do not serve one of them
        unlabelled = found.get(UNLABELLED) if len(labels) == 1 else None
        chosen = [i for label in labels if (i := found.get(label, unlabelled))]
    if [i.width for i in chosen] != list(widths):
        theirs = [f"{label or 'one encoder'} of width {i.width}" for label, i in found.items()]
        made_for = _made_for(found)
        raise CheckpointError(
            f"the textual inversion {name!r} holds vectors for {' and '.join(theirs)}"
            f"{f', those of {made_for}' if made_for else ''}; {title} reads width {' and '.join(map(str, widths))}"
        )
    return tuple(chosen)


def _made_for(found: Mapping[str, Inversion]) -> str:
    if set(found) == set(LABELS):
        return TITLES[BOTH]
    return TITLES.get(CONTEXTS.get(next(iter(found.values())).width, ""), "")
