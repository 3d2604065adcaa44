"""Prompts of any length in windows that CLIP can read: 75 tokens between a mark of the beginning and one of the end.

Nothing is cut. Each window is encoded on its own and the features are joined along the tokens, so a prompt of k
windows gives (B, 77·k, D); the pooled embedding is the first window's. Where a prompt is split follows A1111
(modules/sd_hijack_clip.py, `tokenize_line`): after 75 tokens, or after the last comma if that lies within
`backtrack` tokens, which then move on to the next window together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sfumato import checks
from sfumato.errors import InputError
from sfumato.text.clip_tokens import LENGTH, ClipTokenizer
from sfumato.text.inversion import Inversion, Triggers, trigger_table
from sfumato.text.syntax import Piece, Sections

ROOM = LENGTH - 2  # tokens between bos and eos
BACKTRACK = 20  # tokens; A1111's default
MAX_WEIGHT = 100.0  # far beyond what still gives a picture


@dataclass(frozen=True)
class Window:
    """One row for an encoder. ids and weights: one of each for a place, CLIP's 77, with marks and padding, of weight 1.

    inversions: where each begins among the 77 positions; the ids below its vectors are placeholders.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    inversions: tuple[tuple[int, Inversion], ...] = ()

    @property
    def weighted(self) -> bool:
        return any(weight != 1.0 for weight in self.weights)


@dataclass(frozen=True)
class _Unit:
    """What stays together: a token, or an inversion of several vectors."""

    ids: tuple[int, ...]
    weight: float
    inversion: Inversion | None = None


def lay_out(
    sections: Sections,
    tokenizer: ClipTokenizer,
    inversions: Iterable[Inversion] = (),
    backtrack: int = BACKTRACK,
) -> tuple[Window, ...]:
    """The windows of a parsed prompt, at least one. A section starts a window, even an empty one in the middle.

    backtrack: tokens, 0 to 74; 0 splits after 75 tokens wherever that is. `InputError` for a weight beyond ±100, and
    for an inversion of more than 75 vectors.
    """
    if not 0 <= backtrack < ROOM:
        raise InputError(
            f"backtrack must be from 0 to {ROOM - 1} tokens, not {backtrack}", argument="backtrack"
        )
    triggers = trigger_table(inversions, tokenizer)
    windows: list[Window] = []
    for number, section in enumerate(sections):
        units = [unit for piece in section for unit in _units(piece, tokenizer, triggers)]
        rows = _fill(units, tokenizer.comma, backtrack)
        if rows == [[]] and number and number == len(sections) - 1:
            continue  # nothing follows the last BREAK
        windows += [_window(row, tokenizer) for row in rows]
    return tuple(windows)


def empty_window(tokenizer: ClipTokenizer) -> Window:
    """The window of an empty prompt."""
    return _window([], tokenizer)


def level(
    rows: Sequence[Sequence[Window]], tokenizer: ClipTokenizer, least: int = 1
) -> list[tuple[Window, ...]]:
    """Give every prompt the number of windows of the longest, or `least`, by empty ones at its end, as A1111 does.

    Features of prompts that a denoiser reads side by side must be of one length. The empty windows are read too, so a
    picture's prompt and its negative belong in one call and prompts of different pictures better do not.
    """
    longest = max(least, *map(len, rows))
    return [(*row, *[empty_window(tokenizer)] * (longest - len(row))) for row in rows]


def check_weight(piece: Piece) -> None:
    """`InputError` for a weight that is no number, or beyond ±100."""
    if not math.isfinite(piece.weight) or abs(piece.weight) > MAX_WEIGHT:
        raise InputError(
            f"the weight of {checks.shown(piece.text)} in the prompt is {piece.weight:g}; weights lie between "
            f"{-MAX_WEIGHT:g} and {MAX_WEIGHT:g}",
            argument="prompt",
        )


def _units(piece: Piece, tokenizer: ClipTokenizer, triggers: Triggers) -> list[_Unit]:
    check_weight(piece)
    ids = tokenizer.encode(piece.text)
    units, place = [], 0
    while place < len(ids):
        for trigger, inversion in triggers.get(ids[place], ()):
            if tuple(ids[place : place + len(trigger)]) == trigger:
                if len(inversion) > ROOM:
                    raise InputError(
                        f"the textual inversion {inversion.name!r} has {len(inversion)} vectors; a window holds {ROOM}"
                    )
                units.append(_Unit((0,) * len(inversion), piece.weight, inversion))
                place += len(trigger)
                break
        else:
            units.append(_Unit((ids[place],), piece.weight))
            place += 1
    return units


def _fill(units: Sequence[_Unit], comma: int, backtrack: int) -> list[list[_Unit]]:
    """Units into rows of at most 75 tokens."""
    rows: list[list[_Unit]] = [[]]
    used = 0  # tokens in the last row
    after_comma: tuple[int, int] | None = None  # the last row's units, and tokens, up to its last comma
    for unit in units:
        size = len(unit.ids)
        if used + size > ROOM:
            moved: list[_Unit] = []
            # a comma just past the seam belongs to what stands before it, so nothing moves
            if after_comma and unit.ids != (comma,):
                start, count = after_comma[0], used - after_comma[1]
                if count < backtrack and count + size <= ROOM:
                    moved = rows[-1][start:]
                    del rows[-1][start:]
            rows.append(moved)
            used = sum(len(other.ids) for other in moved)
            after_comma = None
        rows[-1].append(unit)
        used += size
        if unit.ids == (comma,):
            after_comma = len(rows[-1]), used
    return rows


def _window(units: Sequence[_Unit], tokenizer: ClipTokenizer) -> Window:
    ids, weights, inversions = [tokenizer.bos], [1.0], []
    for unit in units:
        if unit.inversion:
            inversions.append((len(ids), unit.inversion))
        ids += unit.ids
        weights += [unit.weight] * len(unit.ids)
    ids.append(tokenizer.eos)
    padding = LENGTH - len(ids)
    return Window(
        (*ids, *[tokenizer.pad] * padding),
        (*weights, *[1.0] * (LENGTH - len(weights))),
        tuple(inversions),
    )
