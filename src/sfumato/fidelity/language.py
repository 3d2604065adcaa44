"""What a prompt says: the words it puts in quotation marks, and how many things it counts. English, by rules."""

from __future__ import annotations

import re
from collections.abc import Iterator

MOST = 10**12  # no more than that is counted
CLOSING = {  # what opens a quotation, and what may close it
    '"': '"', "“": "”“", "”": "”", "„": "“”", "«": "»", "»": "«»", "‹": "›", "›": "‹›", "‘": "’‘", "‚": "‘’", "'": "'",
    "「": "」", "『": "』", "＂": "＂",
}  # fmt: skip
INSIDE_WORDS = "'‘’‚‹›"  # marks that stand in words too, or alone: they open and close only at a word's ends


def _split(words: str) -> list[str]:
    return words.split()


SMALL = {
    word: value
    for value, word in enumerate(
        _split(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen"
        )
    )
}
TENS = {
    word: 10 * value
    for value, word in enumerate(_split("twenty thirty forty fifty sixty seventy eighty ninety"), 2)
}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
VAGUE = {"few": 3, "several": 4, "half": 0.5, "couple": 2}  # before a scale alone: "a few hundred"
MASSES = {  # words that stand for many, with what they come to at least
    "dozens": 24, "hundreds": 200, "thousands": 2000, "millions": 2 * 10**6, "billions": 2 * 10**9, "crowd": 60,
    "swarm": 100, "flock": 40, "fleet": 20, "herd": 30, "countless": 200, "many": 15,
}  # fmt: skip
PLURALS = set(
    _split(
        "people men women children folk fish sheep deer geese mice teeth cattle aircraft dice oxen koi bison "
        "moose salmon trout swine police samurai ninja geisha spacecraft cacti fungi"
    )
)
# what comes in numbers and is no thing in the picture: measures, times, and what a thing is like
NO_THINGS = set(
    _split(
        "mm cm m km inch inches foot feet ft yard yards mile miles meter meters metre metres px pixel pixels dpi "
        "ppi k kb mb gb mp megapixels year years yr yrs yo month months week weeks day days hour hours hrs minute "
        "minutes mins second seconds secs century centuries decade decades degree degrees percent pm am oclock kg "
        "g lbs pounds ounces tons mph kmh fps hz kelvin stops dollars euros cents st nd rd th times steps bit "
        "bits d p s x by old hues shades tones tints colors colours kinds types sorts ways styles angles details "
        "textures layers reflections shadows nuances inspirations awards"
    )
)
BREAKS = set(
    _split(
        "a an the and or of in on at by with without to from for under over beside behind near between against "
        "into around through across above below is are was were has have that which who as but while per made "
        "like along"
    )
)
NUMBERED = set(_split("iso f no number version v chapter figure level route highway page year circa ca"))
DATED = NUMBERED | set(_split("in since from early late the until till"))
NEGATED = {"no", "not", "without", "zero", "never"}
REACH = 4  # words after a number in which the thing counted is named
FIGURES = r"\d{1,3}(?:[,.'’ \u00a0\u202f]\d{3})+(?![\d.,]?\d)|\d+(?:\.\d+)?"
DECADE = re.compile(r"\d0s\b")  # the '90s
TOKEN = re.compile(
    rf"(?P<figures>(?<![\w.:/#$€£])(?<!\d,)(?:{FIGURES}))(?![\w:/%°]|\.\d)|(?P<word>[^\W\d_]+)|(?P<mark>\w+|\S)"
)


def quoted(prompt: str) -> list[str]:
    """What stands in quotation marks, of any of the usual kinds and of any length, spaces made single."""
    found = (" ".join(prompt[start:end].split()) for start, end in _quotations(prompt))
    return [text for text in found if text]


def unquoted(prompt: str) -> str:
    """The rest of a prompt, with a space for each quotation."""
    parts, at = [], 0
    for start, end in _quotations(prompt):
        parts.append(prompt[at : start - 1])
        at = end + 1
    return " ".join([*parts, prompt[at:]])


def counted(text: str) -> int:
    """How many things a text counts: the sum of its numbers, as words or figures, and its lists; `MOST` at most.

    A number counts if the thing it is of is named, in the plural, within a few words; measures, ages, years, lenses and
    shades are no things. "no" and "without" count nothing.
    """
    text = text.lower()
    tokens = [(match.lastgroup or "", match[0]) for match in TOKEN.finditer(text)]
    total, at = 0, 0
    while at < len(tokens):
        value, end, year = _number(tokens, at)
        if end == at:
            word = tokens[at][1]
            if word in MASSES and not _denied(tokens, at) and (word != "many" or _thing(tokens, at + 1)):
                total += MASSES[word]
            at += 1
            continue
        before = tokens[at - 1][1] if at else ""
        numbered = before in (DATED if year else NUMBERED)
        if value > 1 and not numbered and not _denied(tokens, at) and _thing(tokens, end):
            total += value
        at = end
    listed = [part for part in re.split(r",|\band\b", text) if re.search(r"\b(a|an|the|one)\s+\w+", part)]
    return min(total + (len(listed) if len(listed) > 2 else 0), MOST)


def _quotations(prompt: str) -> Iterator[tuple[int, int]]:
    """(start, end) of what stands within marks, left to right; a mark that nothing closes is none."""
    openers = re.compile("[" + "".join(CLOSING) + "]")
    missing: set[str] = set()  # marks that open and are never closed from here on: looked for once
    at = 0
    while match := openers.search(prompt, at):
        at, mark = match.end(), match[0]
        before = prompt[match.start() - 1 : match.start()]
        apostrophe, inches = before.isalnum() and mark in INSIDE_WORDS, before.isdigit() and mark == '"'
        if apostrophe or inches or mark in missing:
            continue
        end = _closed(prompt, mark, at)
        if end < 0:
            missing.add(mark)
        elif end == at or mark != "'" or (end > at + 1 and not DECADE.match(prompt, at)):
            if end > at:
                yield at, end
            at = end + 1


def _closed(prompt: str, mark: str, start: int) -> int:
    """Where what a mark opens at `start` is closed, or -1."""
    for match in re.compile("[" + CLOSING[mark] + "]").finditer(prompt, start):
        if mark not in INSIDE_WORDS or not prompt[match.end() : match.end() + 1].isalnum():
            return match.start()
    return -1


def _number(tokens: list[tuple[str, str]], at: int) -> tuple[int, int, bool]:
    """(value, where the number ends, whether it may be a year) of the number that begins here; it ends where it begins
    if there is none."""
    whole: float = 0  # thousands and more that are complete
    part: float | None = None  # what is below, or stands before the next scale
    end, year, vague = at, False, False
    while end < len(tokens):
        kind, word = tokens[end]
        if kind == "figures" and end == at:
            part = _figures(word)
            year = word.isdigit() and 1000 <= part < 2100
        elif word in SMALL or word in TENS:
            more = SMALL.get(word, TENS.get(word, 0))
            if part is not None and (vague or not _adds(part, more)):
                break
            part = (part or 0) + more
        elif word in SCALES:
            if part is None and end > at:
                break
            part, year = (1 if part is None else part) * SCALES[word], False
            if SCALES[word] >= 1000:
                whole, part = whole + part, None
        elif end == at and word in VAGUE and _scale_after(tokens, end + 1):
            part, vague = float(VAGUE[word]), True
        elif not (vague and end == at + 1 and word in ("a", "of")) and not (
            end > at and word in ("and", "-") and _goes_on(tokens, end, part)
        ):
            break
        end += 1
    value = whole + (part or 0)
    return int(min(value, MOST)), end, year


def _figures(text: str) -> float:
    """A number with or without marks between thousands."""
    groups = re.split(r"[,.'’ \u00a0\u202f]", text)
    if len(groups) > 1 and all(len(group) == 3 for group in groups[1:]):
        text = "".join(groups)
    return float(text) if len(text) < 16 else float(MOST)


def _adds(part: float, value: int) -> bool:
    """Whether a number word goes on with what came before it: twenty | five, two hundred | thirty."""
    if part >= 100 and part % 100 == 0:
        return True
    return part % 100 >= 20 and part % 10 == 0 and 0 < value < 10


def _goes_on(tokens: list[tuple[str, str]], at: int, part: float | None) -> bool:
    """Whether a hyphen or "and" stands within a number: twenty-five, two hundred and five, a thousand and one."""
    following = tokens[at + 1][1] if at + 1 < len(tokens) else ""
    value = SMALL.get(following, TENS.get(following))
    if tokens[at][1] == "-":
        return part is not None and value is not None and part % 100 in TENS.values()
    return value is not None and (part is None or (part >= 100 and part % 100 == 0))


def _scale_after(tokens: list[tuple[str, str]], at: int) -> bool:
    """Whether a scale comes next, after "a" or "of" at most."""
    words = [word for _, word in tokens[at : at + 2]]
    return bool(words) and (words[0] in SCALES or (words[0] in ("a", "of") and words[-1] in SCALES))


def _denied(tokens: list[tuple[str, str]], at: int) -> bool:
    return any(word in NEGATED for _, word in tokens[max(at - 2, 0) : at])


def _thing(tokens: list[tuple[str, str]], at: int) -> bool:
    """Whether things are named here, in the plural, and are no measure."""
    if at < len(tokens) and tokens[at][1] == "of":
        at += 1
    for kind, word in tokens[at : at + REACH]:
        if word == "-":
            continue
        if kind != "word" or word in NO_THINGS or word in BREAKS:
            return False
        if (
            word in PLURALS
            or word.endswith("men")
            or (len(word) > 2 and re.search(r"[^suii]s$|ies$|uses$", word))
        ):
            return True
    return False
