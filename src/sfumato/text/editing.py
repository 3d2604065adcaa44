"""Prompts that change while a picture is drawn, and prompts drawn together, as A1111 writes them.

    [from:to:when]   `from` before the step `when`, then `to`; [to:when] adds, [from::when] takes away
    [a|b|c]          one after the other, a new one at every step; a part may be empty
    one AND two :2   each read and answered on its own, added with its weight, which is 1 unless said

`when` counts steps from 1, and with a point in it it is a share of them: 10 is after the tenth step, .5 after half.
What stands in brackets may hold brackets of all kinds; a backslash before one means the character. A bracket of another
form is left as it is, for `text.syntax` to read. Pure functions; any text is a prompt.

The rules are those of AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py, since its version 1.6. It looks
them up by a count of the network's calls that begins at 0, and so draws one more before a change than it says; here a
change is after the step that is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from sfumato.errors import InputError
from sfumato.text.windows import MAX_WEIGHT

EDITED = "a1111"  # the rule of `text.syntax` that has these marks
_MARK = re.compile(r"\\.|[\[\]():|]", re.DOTALL)
_WHEN = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")
MAX_DEPTH = 100  # of edits and alternations inside each other
_AND = re.compile(r"\bAND\b")
_WEIGHTED = re.compile(r"(?P<text>.*?)\s*:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*", re.DOTALL)
Stages = tuple[tuple[int, str], ...]  # (the step up to which it holds, prompt): the last holds to the end


@dataclass(frozen=True)
class _Edit:
    before: _Parts
    after: _Parts
    when: str


@dataclass(frozen=True)
class _Turns:
    options: tuple[_Parts, ...]


_Parts = tuple["str | _Edit | _Turns", ...]


def schedule(prompt: str, steps: int, done: int = 0) -> Stages:
    """What the prompt is up to which of `steps` steps, counted from 1: one stage for a prompt that does not change.

    done: steps of a pass before this one, which numbers count on from: 12 is the second step after ten, and shares go
    from 1 to 2. So an edit meant for the first pass has happened in the second.
    """
    parts = _parse(prompt)
    ends = sorted({*_ends(parts, steps, done), steps})
    stages: list[tuple[int, str]] = []
    for end in ends:
        text = "".join(_at(parts, end, steps, done))
        if stages and stages[-1][1] == text:
            stages.pop()
        stages.append((end, text))
    return tuple(stages)


def together(prompt: str) -> tuple[tuple[str, float], ...]:
    """The prompts that `AND` joins, each with its weight. `InputError` for a weight beyond ±100."""
    found = []
    for part in _AND.split(prompt):
        match = _WEIGHTED.fullmatch(part)
        text, weight = (match["text"], float(match["weight"])) if match else (part, 1.0)
        if abs(weight) > MAX_WEIGHT:
            raise InputError(
                f"the weight of a prompt joined by AND is {weight:g}; weights lie between {-MAX_WEIGHT:g} and "
                f"{MAX_WEIGHT:g}",
                argument="prompt",
            )
        found.append((text, weight))
    return tuple(found) if len(found) > 1 else ((prompt, 1.0),)


def _parse(prompt: str) -> _Parts:
    marks = [mark for mark in _MARK.finditer(prompt) if mark[0][0] != "\\"]
    return _Reader(prompt, marks, _pairs(marks)).parts(0, len(marks), 0, len(prompt))


def _pairs(marks: list[re.Match[str]]) -> dict[int, int]:
    """Place of each bracket that is closed to the place of its partner. Those that cross have none."""
    pairs: dict[int, int] = {}
    opened: list[list[int]] = [
        []
    ]  # square brackets, each with the round ones opened inside it; first those outside
    for place, mark in enumerate(marks):
        if mark[0] == "[":
            opened.append([place])
        elif mark[0] == "(":
            opened[-1].append(place)
        elif mark[0] == "]" and len(opened) > 1:
            pairs[opened.pop()[0]] = place  # a round one inside that was never closed is text
        elif mark[0] == ")" and len(opened[-1]) > (len(opened) > 1):
            pairs[opened[-1].pop()] = place
    if len(opened) > 1:  # a square one that was never closed is text too, so what it kept apart may not be
        stray = {inside[0] for inside in opened[1:]}
        rest = [place for place in range(len(marks)) if place not in stray]
        inner = _pairs([marks[place] for place in rest])
        return {rest[a]: rest[b] for a, b in inner.items()}
    return pairs


@dataclass(frozen=True)
class _Reader:
    """A prompt with its marks. pairs: place of an opening bracket among them to that of its partner."""

    prompt: str
    marks: list[re.Match[str]]
    pairs: dict[int, int]

    def parts(self, first: int, last: int, start: int, end: int, depth: int = 0) -> _Parts:
        """Those of prompt[start:end], in which marks[first:last] lie."""
        if depth > MAX_DEPTH:
            raise InputError(
                f"the prompt has more than {MAX_DEPTH} edits or alternations inside each other",
                argument="prompt",
            )
        parts: list[str | _Edit | _Turns] = []
        at, place = start, first
        while place < last:
            close = self.pairs.get(place)
            made = None
            if close is not None and self.marks[place][0] == "[":
                made = self._bracket(place, close, depth)
            if close is None or made is None:  # text, around what may be inside
                place += 1
                continue
            parts += [self.prompt[at : self.marks[place].start()], made]
            at, place = self.marks[close].end(), close + 1
        parts.append(self.prompt[at:end])
        return tuple(part for part in parts if part != "")

    def _bracket(self, opening: int, close: int, depth: int) -> _Edit | _Turns | None:
        """What a square bracket means here, None where it is no edit and no alternation."""
        colons, bars = list[int](), list[int]()  # of its own, not of brackets inside
        place = opening + 1
        while place < close:
            if place in self.pairs:
                place = self.pairs[place]
            elif self.marks[place][0] in ":|":
                (colons if self.marks[place][0] == ":" else bars).append(place)
            place += 1

        def between(left: int, right: int) -> _Parts:
            edges = self.marks[left].end(), self.marks[right].start()
            return self.parts(left + 1, right, *edges, depth + 1)

        if colons:
            edges = self.marks[colons[-1]].end(), self.marks[close].start()
            when = _WHEN.fullmatch(self.prompt, *edges)
            if when is None or len(colons) > 2:
                return None
            if len(colons) == 1:
                return _Edit((), between(opening, colons[0]), when[1])
            return _Edit(between(opening, colons[0]), between(*colons), when[1])
        if bars:
            return _Turns(tuple(between(*pair) for pair in pairwise([opening, *bars, close])))
        return None


def _step(when: str, steps: int, done: int) -> int:
    """The last step before an edit; 0 or less where it has happened from the first."""
    passes = 1 if done else 0
    value = (float(when) - passes) * steps if "." in when else float(when) - done
    return int(min(max(value, 0), steps))


def _ends(parts: _Parts, steps: int, done: int) -> Iterator[int]:
    for part in parts:
        if isinstance(part, _Edit):
            if (end := _step(part.when, steps, done)) >= 1:
                yield end
            yield from _ends(part.before + part.after, steps, done)
        elif isinstance(part, _Turns):
            yield from range(1, steps + 1)
            for option in part.options:
                yield from _ends(option, steps, done)


def _at(parts: _Parts, step: int, steps: int, done: int) -> Iterator[str]:
    """The text at a step, counted from 1."""
    for part in parts:
        if isinstance(part, _Edit):
            chosen = part.before if step <= _step(part.when, steps, done) else part.after
            yield from _at(chosen, step, steps, done)
        elif isinstance(part, _Turns):
            yield from _at(part.options[(step - 1) % len(part.options)], step, steps, done)
        else:
            yield part
