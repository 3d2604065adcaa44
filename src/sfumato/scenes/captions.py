"""Words for scenes: statements (what a caption claims, exactly), and a small grammar that says them.

A statement from `describe` is true of its scene, which `holds` decides without looking at the words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from sfumato.errors import InputError
from sfumato.scenes.graph import COLORS, INVERSE, Object, Scene, camera_move, manner_of, motion_of, related
from sfumato.scenes.words import (
    CAMERA_WORDS,
    COLOR_WORDS,
    ENDINGS,
    MATERIAL_WORDS,
    MOTION_WORDS,
    NOUNS,
    NUMBERS,
    PASSING,
    PLURALS,
    POSSESSIVE,
    RELATION_WORDS,
    SIZE_WORDS,
    SPEED_WORDS,
    STANDING,
    VERBS,
)

MAX_WORDS = 45
CAMERA_TOLD, PASSING_TOLD, MANNER_TOLD = 0.85, 0.8, 0.7  # shares of the captions of clips
SENTENCE = 0.6  # share of those that are sentences and not lists of nouns
STYLES = ("mixed", "full", "short")


@dataclass(frozen=True)
class ObjectClaim:
    """`count` objects with the given attributes; None leaves one open. A count above 1 claims there are no more.

    motion: one of `graph.MOTIONS`; speed: slow or fast, and manner: one of `graph.MANNERS`, only beside a motion.
    """

    shape: str | None = None
    color: str | None = None
    material: str | None = None
    size: str | None = None
    count: int = 1
    motion: str | None = None
    speed: str | None = None
    manner: str | None = None


@dataclass(frozen=True)
class RelationClaim:
    """Claim `subject` stands in `relation` (of `graph.RELATIONS`) to claim `object`, as the viewer sees it; or goes
    past or around it, which the first claim may do by the second.
    """

    subject: int
    relation: str
    object: int


@dataclass(frozen=True)
class Statement:
    """What a caption claims; `exact` claims also that the picture shows nothing else. camera: one of
    `graph.CAMERA_MOVES`, or None for nothing said.
    """

    objects: tuple[ObjectClaim, ...]
    relations: tuple[RelationClaim, ...] = ()
    exact: bool = True
    camera: str | None = None


def matches(claim: ObjectClaim, scene: Scene, obj: Object) -> bool:
    """Whether one object has every attribute of the claim."""
    for name in ("shape", "color", "material", "size"):
        wanted = getattr(claim, name)
        if wanted is not None and wanted != getattr(obj, name):
            return False
    if claim.motion is None:
        return True
    moves = motion_of(scene, obj)
    if moves is None or moves[1] != claim.motion or claim.speed not in (None, moves[0]):
        return False
    return claim.manner in (None, manner_of(scene, obj))


def holds(statement: Statement, scene: Scene) -> bool:
    """Whether distinct objects of the scene can play all the claims, with every relation between them."""
    candidates = [[k for k, o in enumerate(scene.objects) if matches(c, scene, o)] for c in statement.objects]
    for claim, found in zip(statement.objects, candidates, strict=True):
        if claim.count > 1 and len(found) != claim.count:
            return False
    if statement.camera is not None and statement.camera != camera_move(scene):
        return False
    if statement.exact and sum(c.count for c in statement.objects) != len(scene.objects):
        return False

    def assign(claim: int, used: frozenset[int], chosen: tuple[tuple[int, ...], ...]) -> bool:
        if claim == len(candidates):
            return all(
                related(scene, a, r.relation, b)
                for r in statement.relations
                for a in chosen[r.subject]
                for b in chosen[r.object]
            )
        free = [k for k in candidates[claim] if k not in used]
        count = statement.objects[claim].count
        groups = [tuple(free)] if count > 1 else [(k,) for k in free]
        return any(len(g) == count and assign(claim + 1, used | set(g), (*chosen, g)) for g in groups)

    return assign(0, frozenset(), ())


def describe(scene: Scene, seed: int, style: str = "mixed") -> tuple[str, Statement]:
    """A caption and what it claims. Styles: "full" names every object with all attributes; "short" drops attributes or
    objects; "mixed" is 70% all objects (most with all attributes) and 30% short. Raises `InputError`."""
    if style not in STYLES:
        raise InputError(f"style {style!r} is unknown; use one of {', '.join(STYLES)}", argument="style")
    random = Random(f"describe {seed}")
    statement = _state(scene, random, style)
    text = phrase(statement, seed)
    while len(text.split()) > MAX_WORDS and (less := _less(statement)) is not None:
        statement, text = less, phrase(less, seed)
    return text, statement


def _less(statement: Statement) -> Statement | None:
    """The statement without what is missed least, which is as true; None where only objects are left."""
    if statement.relations:
        return replace(statement, relations=statement.relations[:-1])
    if statement.camera is not None:
        return replace(statement, camera=None)
    for told in (("speed", "manner"), ("motion",)):
        for k, claim in reversed([*enumerate(statement.objects)]):
            if any(getattr(claim, name) is not None for name in told):
                shorter = replace(claim, **dict.fromkeys(told))
                objects = (*statement.objects[:k], shorter, *statement.objects[k + 1 :])
                return replace(statement, objects=objects)
    return None


def _state(scene: Scene, random: Random, style: str) -> Statement:
    if style == "mixed":
        style = "short" if random.random() < 0.3 else ("full" if random.random() < 0.7 else "sparse")
    everything = list(range(len(scene.objects)))
    _shuffle(everything, random)
    order = everything
    if style == "short" and len(order) > 1 and random.random() < 0.35:
        order = order[: 1 + int(random.random() * (len(order) - 1))]
    groups = _group(order, [_claim(scene, scene.objects[k], random, style) for k in order])
    if any(c.count > 1 and c.count != sum(matches(c, scene, o) for o in scene.objects) for c, _ in groups):
        # what was left out makes a count wrong: say everything instead
        order = everything
        groups = _group(order, [_claim(scene, scene.objects[k], random, "still") for k in order])
    claims = [claim for claim, _ in groups]
    found = _relate(scene, groups, random) if random.random() < (0.5 if style == "short" else 0.75) else ()
    exact = len(order) == len(everything)
    if scene.frames == 1:
        return Statement(tuple(claims), found, exact)
    camera = camera_move(scene) if random.random() < CAMERA_TOLD else None
    if (pair := _passing(scene, groups)) and random.random() < PASSING_TOLD:
        (i, relation, j), rest = pair, [k for k in range(len(claims)) if k not in (pair[0], pair[2])]
        found, claims = (RelationClaim(0, relation, 1),), [claims[k] for k in (i, j, *rest)]
    return Statement(tuple(claims), found, exact, camera)


def _passing(scene: Scene, groups: list[tuple[ObjectClaim, list[int]]]) -> tuple[int, str, int] | None:
    """The first two claims of which one goes past or around the other and says that it moves."""
    for i, (claim, mine) in enumerate(groups):
        for j, (other, theirs) in enumerate(groups):
            if i != j and claim.motion and claim.count == other.count == 1:
                for relation in PASSING:
                    if related(scene, mine[0], relation, theirs[0]):
                        return i, relation, j
    return None


def _claim(scene: Scene, obj: Object, random: Random, style: str) -> ObjectClaim:
    claim = ObjectClaim(obj.shape, obj.color, obj.material, obj.size)
    if style == "still":
        return claim
    if style == "sparse":
        kept = random.random()  # material alone, size alone, or neither
        claim = replace(
            claim, size=None if kept < 0.7 else obj.size, material=None if kept > 0.35 else obj.material
        )
    elif style == "short":
        claim = replace(claim, material=None, size=obj.size if random.random() < 0.25 else None)
        dropped = random.random()
        if dropped < 0.12:
            claim = replace(claim, color=None) if dropped < 0.08 else replace(claim, shape=None)
    moves = motion_of(scene, obj)
    if moves and random.random() < (0.9 if style == "full" else 0.7):
        speed = moves[0] if moves[1] != "up" and random.random() < 0.6 else None
        manner = manner_of(scene, obj) if random.random() < MANNER_TOLD else None
        claim = replace(claim, motion=moves[1], speed=speed, manner=manner)
    return claim


def _group(order: list[int], claims: list[ObjectClaim]) -> list[tuple[ObjectClaim, list[int]]]:
    """Equal claims become one with a count."""
    members: dict[ObjectClaim, list[int]] = {}
    for k, claim in zip(order, claims, strict=True):
        members.setdefault(claim, []).append(k)
    return [(replace(claim, count=len(found)), found) for claim, found in members.items()]


def _relate(
    scene: Scene, groups: list[tuple[ObjectClaim, list[int]]], random: Random
) -> tuple[RelationClaim, ...]:
    """Up to two relations, each between a claim and an earlier one that words can point back to."""
    claims = [claim for claim, _ in groups]
    found: list[RelationClaim] = []
    for j in range(1, len(groups)):
        if len(found) == 2 or (found and random.random() < 0.5):
            break
        choices = []
        for i in range(j):
            single = claims[i].count == claims[j].count == 1 and not (claims[i].motion or claims[j].motion)
            if not single or (not (i == 0 and j == 1) and _reference(claims, i) is None):
                continue
            a, b = groups[i][1][0], groups[j][1][0]
            for relation in RELATION_WORDS:
                if related(scene, a, relation, b):
                    choices.append(RelationClaim(i, relation, j))
                    choices.append(RelationClaim(j, INVERSE[relation], i))
        if choices:
            found.append(choices[int(random.random() * len(choices))])
    return tuple(found)


def phrase(statement: Statement, seed: int) -> str:
    """Say a statement in words; the seed picks synonyms and constructions. Raises `InputError` for a broken one."""
    _check(statement)
    random = Random(f"phrase {seed}")
    nouns = {shape: _word(NOUNS[shape], random) for shape in NOUNS}
    sentence = any(claim.motion for claim in statement.objects) and random.random() < SENTENCE
    texts = [_noun_phrase(claim, nouns, random, sentence) for claim in statement.objects]
    if sentence:
        spoken = {k for r in statement.relations for k in (r.subject, r.object)}
        for k, claim in enumerate(statement.objects):
            if claim.motion is None and claim.count == 1 and k not in spoken:
                texts[k] = f"{texts[k]} {_word(STANDING, random)}"
    by_later: dict[int, list[RelationClaim]] = {}
    for relation in statement.relations:
        by_later.setdefault(max(relation.subject, relation.object), []).append(relation)
    clauses: list[str] = []
    plain = True
    for j, text in enumerate(texts):
        mine = by_later.get(j, [])
        if not mine:
            clauses.append(text)
        elif j == 1:  # the first pair is said in one breath; a second relation between the two follows
            plain = False
            more = [f"{_relation(r, 0, random)} it" for r in mine[1:]]
            clauses[0] = " and ".join([_pair(statement, texts, mine[0], random), *more])
        else:
            plain = False
            link = " and " if statement.objects[j].motion else " "
            said = [f"{_relation(r, j, random)} {_definite(statement.objects, r, j, nouns)}" for r in mine]
            clauses.append(text + link + " and ".join(said))
    text = _join(clauses, plain)
    if not statement.exact:  # always said, or silence would come to mean «and perhaps more»
        text = f"{text} {_word(ENDINGS, random)}"
    if statement.camera:
        text = f"{text} while the camera {_word(CAMERA_WORDS[statement.camera], random)}"
    if not sentence and random.random() < 0.06:
        text = f"{_word((('a picture of', 1), ('a scene with', 1)), random)} {text}"
    return text


def _pair(statement: Statement, texts: list[str], claim: RelationClaim, random: Random) -> str:
    """The first two claims: "A behind B", or "B with A behind it"."""
    if claim.relation in PASSING:
        return f"{texts[0]} {PASSING[claim.relation]} {texts[1]}"
    first = claim.relation if claim.subject == 0 else INVERSE[claim.relation]
    simple = all(c.count == 1 and not c.motion for c in statement.objects[:2])
    if simple and random.random() < 0.22:
        return f"{texts[0]} with {texts[1]} {POSSESSIVE[INVERSE[first]]}"
    link = " and " if statement.objects[0].motion else " "
    return f"{texts[0]}{link}{_word(RELATION_WORDS[first], random)} {texts[1]}"


def _relation(claim: RelationClaim, subject: int, random: Random) -> str:
    return _word(
        RELATION_WORDS[claim.relation if claim.subject == subject else INVERSE[claim.relation]], random
    )


def _definite(
    claims: tuple[ObjectClaim, ...], relation: RelationClaim, j: int, nouns: dict[str | None, str]
) -> str:
    other = relation.object if relation.subject == j else relation.subject
    names = _reference(list(claims), other) or ("size", "color", "material", "shape")
    claim = claims[other]
    words = [
        str(getattr(claim, n)) for n in ("size", "color", "material") if n in names and getattr(claim, n)
    ]
    noun = nouns[claim.shape]
    return " ".join(["the", *words, _plural(noun) if claim.count > 1 else noun])


def _reference(claims: list[ObjectClaim], index: int) -> tuple[str, ...] | None:
    """The fewest attributes that set a claim apart from all the others, or None."""
    claim = claims[index]
    for names in (
        ("shape",),
        ("color", "shape"),
        ("size", "shape"),
        ("size", "color", "shape"),
        ("color", "material", "shape"),
    ):
        if all(getattr(claim, n) is not None for n in names):
            others = (c for k, c in enumerate(claims) if k != index)
            if all(any(getattr(c, n) not in (None, getattr(claim, n)) for n in names) for c in others):
                return names
    return None


def _noun_phrase(
    claim: ObjectClaim, nouns: dict[str | None, str], random: Random, sentence: bool = False
) -> str:
    size = _word(SIZE_WORDS[claim.size], random) if claim.size else ""
    color = _word(COLOR_WORDS.get(claim.color, ((claim.color, 1),)), random) if claim.color else ""
    material = _word(MATERIAL_WORDS[claim.material], random) if claim.material else ""
    middle = [color, material] if material in {"metal", "rubber"} else [material, color]
    noun = nouns[claim.shape]
    words = [w for w in (size, *middle) if w] + [_plural(noun) if claim.count > 1 else noun]
    article = NUMBERS[claim.count] if claim.count > 1 else ("an" if words[0][0] in "aeiou" else "a")
    if claim.motion:
        words += _going(claim, random, sentence)
    return " ".join([article, *words])


def _going(claim: ObjectClaim, random: Random, sentence: bool) -> list[str]:
    """Verb, direction and speed of what moves: "rolls to the left quickly", "rolling left"."""
    finite, participle = VERBS[claim.manner]
    if sentence and claim.count > 1:
        finite = {"moves": "move"}.get(finite, finite.removesuffix("s"))
    words = [finite if sentence else participle]
    if claim.manner != "circles":
        words.append(_word(MOTION_WORDS[str(claim.motion)], random))
    return [*words, _word(SPEED_WORDS[claim.speed], random)] if claim.speed else words


def _join(clauses: list[str], plain: bool) -> str:
    if len(clauses) < 3 and plain:
        return " and ".join(clauses)
    head = ", ".join(clauses[:-1])
    return f"{head}{' and ' if plain else ', and '}{clauses[-1]}" if head else clauses[-1]


def _check(statement: Statement) -> None:
    if not statement.objects:
        raise InputError("a statement needs at least one object", argument="statement")
    for claim in statement.objects:
        for name, words in (
            ("shape", NOUNS),
            ("material", MATERIAL_WORDS),
            ("size", SIZE_WORDS),
            ("motion", MOTION_WORDS),
            ("manner", VERBS),
        ):
            value = getattr(claim, name)
            if value is not None and value not in words:
                raise InputError(f"{name} {value!r} is unknown", argument=name)
        if claim.color is not None and claim.color not in COLORS:
            raise InputError(
                f"color {claim.color!r} is unknown; use one of {', '.join(COLORS)}", argument="color"
            )
        if claim.count != 1 and claim.count not in NUMBERS:
            raise InputError(f"count {claim.count} is outside 1 to 5", argument="count")
    for relation in statement.relations:
        ends = {relation.subject, relation.object}
        first = (relation.subject, relation.object) == (0, 1) and statement.objects[0].motion is not None
        if (
            (relation.relation not in RELATION_WORDS and not (relation.relation in PASSING and first))
            or len(ends) != 2
            or not ends <= set(range(len(statement.objects)))
        ):
            raise InputError(
                f"relation {relation} names no two objects of the statement", argument="relations"
            )


def _word(choices: tuple[tuple[str, int], ...], random: Random) -> str:
    at = random.random() * sum(weight for _, weight in choices)
    for word, weight in choices:
        at -= weight
        if at < 0:
            return word
    return choices[-1][0]


def _plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


def _shuffle(items: list[int], random: Random) -> None:
    for k in range(len(items) - 1, 0, -1):
        j = int(random.random() * (k + 1))
        items[k], items[j] = items[j], items[k]
