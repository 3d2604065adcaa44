"""Prompts to weighted pieces, under a named rule. Pure functions; any text is a prompt.

    a1111    (word) ×1.1   [word] ÷1.1   (word:1.3) ×1.3   \\( \\) \\[ \\] \\\\ are the characters   BREAK: a new window
             Nested weights multiply. A closing bracket that closes nothing is text; an opening one that is never closed
             holds to the end. A lone backslash is dropped.
             (AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py, `parse_prompt_attention`)
    comfy    (word) ×1.1   (word:1.3) sets 1.3, whatever stands around it   \\( \\) are the characters
             (Comfy-Org/ComfyUI, comfy/sd1_clip.py, `token_weights`)
    compel   word+ word++ ×1.1 each   word- word-- ×0.9 each   (a phrase)++ (a phrase)1.3   Nested weights multiply.
             A backslash before ( ) + - " . , = means the character. (damian0815/compel, src/compel/prompt_parser.py)
    none     every character is text

Deviations, all in what the originals get wrong or leave open: BREAK starts a window inside brackets too, where A1111
reads it as a word of negative weight; a number it would stumble over, as in (a:1.2.3), is text; for comfy and compel a
bracket without its partner is text and the rest of the prompt keeps its meaning. A1111's prompt editing
`[from:to:when]`, alternation `[a|b]` and AND are resolved before, by `text.editing`. Not covered: compel's methods,
which are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from sfumato import checks
from sfumato.errors import InputError

UP, DOWN = 1.1, 1 / 1.1  # what one bracket of a1111 and comfy multiplies by
PLUS, MINUS = 1.1, 0.9  # what one sign of compel multiplies by


@dataclass(frozen=True)
class Piece:
    """A stretch of text and the weight of its tokens; 1 is neutral. Very deep nesting may overflow to infinity."""

    text: str
    weight: float = 1.0


Sections = tuple[tuple[Piece, ...], ...]  # each section starts a new window


def parse(prompt: str, rule: str = "a1111") -> Sections:
    """Sections of pieces, in reading order. Neighbours of one weight are one piece, and no piece is empty.

    There is always a section, which is empty for an empty prompt. `InputError` for an unknown rule, and for compel's
    methods.
    """
    return rule_named(rule)(prompt)


def rule_named(name: str) -> Callable[[str], Sections]:
    """The rule's parser; an unknown name is an `InputError` that lists the known ones."""
    if name not in RULES:
        raise InputError(
            f"prompt_rules {checks.shown(name)} are unknown; known are {', '.join(RULES)}",
            argument="prompt_rules",
        )
    return RULES[name]


class _Writer:
    """Collects text with its weight into sections."""

    def __init__(self) -> None:
        self.sections: list[list[tuple[list[str], float]]] = [[]]

    def text(self, text: str, weight: float) -> None:
        if not text:
            return
        section = self.sections[-1]
        if section and section[-1][1] == weight:
            section[-1][0].append(text)
        else:
            section.append(([text], weight))

    def section(self) -> None:
        self.sections.append([])

    def done(self) -> Sections:
        return tuple(
            tuple(Piece("".join(parts), weight) for parts, weight in section) for section in self.sections
        )


# --- a1111 -------------------------------------------------------------------------------------------------------

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_A1111 = re.compile(
    r"(?P<escape>\\[()\[\]\\]?)"
    r"|(?P<open>[(\[])"
    rf"|(?P<close>:\s*(?P<weight>{_NUMBER})\s*\)|[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_BREAK = re.compile(r"\bBREAK\b")
_OPENING = {")": "(", "]": "["}


def _a1111(prompt: str) -> Sections:
    marks = list(_A1111.finditer(prompt))
    opened: dict[str, list[int]] = {"(": [], "[": []}
    factors: dict[int, float] = {}  # of each opening bracket, by its place among the marks
    closing = set()
    for place, mark in enumerate(marks):
        if mark.lastgroup == "open":
            opened[mark[0]].append(place)
            factors[place] = UP if mark[0] == "(" else DOWN
        elif mark.lastgroup == "close" and opened[_OPENING[mark[0][-1]]]:
            closing.add(place)
            start = opened[_OPENING[mark[0][-1]]].pop()
            if mark["weight"]:
                factors[start] = float(mark["weight"])

    # round and square brackets may cross, as in "(a [b) c]", so each kind has its own stack of weights
    weights: dict[str, list[float]] = {"(": [1.0], "[": [1.0]}
    writer = _Writer()
    for place, mark in enumerate(marks):
        weight = weights["("][-1] * weights["["][-1]
        if mark.lastgroup == "open":
            stack = weights[mark[0]]
            stack.append(stack[-1] * factors[place])
        elif place in closing:
            weights[_OPENING[mark[0][-1]]].pop()
        elif mark.lastgroup == "escape":
            writer.text(mark[0][1:], weight)
        else:
            _with_breaks(writer, mark[0], weight)
    return writer.done()


def _with_breaks(writer: _Writer, text: str, weight: float) -> None:
    """Text in which BREAK starts a section; the white space around the word goes with it."""
    parts = _BREAK.split(text)
    for number, part in enumerate(parts):
        if number:
            writer.section()
            part = part.lstrip()
        writer.text(part.rstrip() if number < len(parts) - 1 else part, weight)


# --- comfy and compel --------------------------------------------------------------------------------------------

_COMFY = re.compile(
    r"(?P<escape>\\[()])"
    r"|(?P<open>\()"
    rf"|(?P<close>:\s*(?P<weight>{_NUMBER}(?:[eE][+-]?\d+)?)\s*\)|\))"
    r"|(?P<text>[^\\():]+|[:\\])"
)
_END = r"[\s()\".,=]|\Z"  # what may follow a weighted word
_COMPEL = re.compile(
    r"(?P<open>\()"
    rf"|(?P<close>\)(?P<weight>\++|-+|(?:\d+\.?\d*|\.\d+)(?!\w))?)"
    # a word keeps the signs inside it, as in half-open; the signs at its end are its weight
    rf"|(?P<word>(?:[^\s()\\\".,=+-]|\\[()\".,=+-]|[+-]++(?!{_END}))++)(?P<signs>(?:\++|-+)(?={_END}))?"
    r"|(?P<text>\s+|[+-]+|.)",
    re.DOTALL,
)
_ESCAPED = re.compile(r"\\([()\".,=+-])")
_METHOD = re.compile(r"[)\"\w]\.(?P<name>blend|and|add|swap|attend)\s*\(|\b(?P<lora>withLora|useLora)\s*\(")


def _comfy(prompt: str) -> Sections:
    marks = list(_COMFY.finditer(prompt))
    pairs = _pairs(marks)
    writer, weights = _Writer(), [1.0]
    for place, mark in enumerate(marks):
        if place not in pairs:
            writer.text(mark[0][1:] if mark.lastgroup == "escape" else mark[0], weights[-1])
        elif mark.lastgroup == "open":
            explicit = marks[pairs[place]]["weight"] if pairs[place] > place + 1 else None
            weights.append(float(explicit) if explicit else weights[-1] * UP)
        else:
            if pairs[place] == place - 1:  # "(:1.3)" has nothing to weigh but itself
                writer.text(mark[0][:-1], weights[-1])
            weights.pop()
    return writer.done()


def _compel(prompt: str) -> Sections:
    method = _METHOD.search(prompt)
    if method:
        name = method["name"] or method["lora"]
        what = f".{name}()" if method["name"] else f"{name}()"
        instead = (
            " write (phrase)1.3 instead"
            if name == "attend"
            else f" escape its bracket, {name}\\(, to mean text"
        )
        raise InputError(
            f"the prompt uses compel's {what}, which is not supported;{instead}", argument="prompt"
        )
    marks = list(_COMPEL.finditer(prompt))
    pairs = _pairs(marks)
    writer, weights = _Writer(), [1.0]
    for place, mark in enumerate(marks):
        if place not in pairs:
            if mark["word"]:
                writer.text(
                    _ESCAPED.sub(r"\1", mark["word"]), weights[-1] * _compel_factor(mark["signs"] or "")
                )
            else:
                writer.text(mark[0], weights[-1])
        elif mark.lastgroup == "open":
            weights.append(weights[-1] * _compel_factor(marks[pairs[place]]["weight"] or ""))
        else:
            weights.pop()
    return writer.done()


def _pairs(marks: list[re.Match[str]]) -> dict[int, int]:
    """Places of round brackets that belong together, each to the other."""
    pairs, opened = {}, []
    for place, mark in enumerate(marks):
        if mark.lastgroup == "open":
            opened.append(place)
        elif mark.lastgroup == "close" and opened:
            start = opened.pop()
            pairs[start], pairs[place] = place, start
    return pairs


def _compel_factor(weight: str) -> float:
    if weight.startswith("+"):
        return PLUS ** min(len(weight), 1000)
    if weight.startswith("-"):
        return MINUS ** len(weight)
    return float(weight) if weight else 1.0


def _none(prompt: str) -> Sections:
    return ((Piece(prompt),) if prompt else (),)


RULES: dict[str, Callable[[str], Sections]] = {
    "a1111": _a1111,
    "comfy": _comfy,
    "compel": _compel,
    "none": _none,
}
